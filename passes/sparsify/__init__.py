"""Third stage: operators on maps become operators on rows, one family a file."""
