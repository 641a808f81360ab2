"""How much of a device's memory a pair takes, and which of its blocks stay there."""
