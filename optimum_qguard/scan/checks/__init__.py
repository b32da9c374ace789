"""What the detector `integrity` checks, one file each: a function of what is scanned that yields findings."""
