"""Models of other libraries, adapted to sequences that are cut over ranks."""
