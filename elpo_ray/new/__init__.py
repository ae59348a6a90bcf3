"""`elpo new FOLDER`: a project of the user's own to start from, which trains at once."""
