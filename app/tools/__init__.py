"""What the command line does with files: convert, merge, compare, fetch, folders of pictures, facts."""
