"""Optional checks of a picture, by name: each gives a score, and above its limit the picture is left out."""
