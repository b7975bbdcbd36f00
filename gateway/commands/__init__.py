"""The `headgate` commands, one file each."""
