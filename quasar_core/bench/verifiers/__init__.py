"""Which verifier, of how many bits, makes `exact` fastest for a target on this device."""
