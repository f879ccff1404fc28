"""The `tandem` command for the person at the keyboard."""
