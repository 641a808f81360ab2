"""What a pair takes of a device's memory, and which of its blocks stay there."""
