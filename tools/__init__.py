"""What keeps the book: running pages, cleaning notebooks, the site, the README. Not part of the
installed package."""
