"""How the bundled classifier was trained, and the drawings that its training needs."""
