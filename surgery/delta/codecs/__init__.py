"""How the bytes of one tensor are coded, given its base. Nothing here knows of files."""
