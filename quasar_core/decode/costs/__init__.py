"""What passes cost, in seconds: measured once, remembered, corrected while decoding."""
