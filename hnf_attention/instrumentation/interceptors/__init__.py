"""Where attention calls are caught, one library a file."""
