"""AVIF: read box by box and written anew, so that a decoder gets nothing but one still picture."""
