"""Parts of the rules of this stage that are too long for the file of their family."""
