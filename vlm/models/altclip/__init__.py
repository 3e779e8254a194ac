"""models/altclip."""
