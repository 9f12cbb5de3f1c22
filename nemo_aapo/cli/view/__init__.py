"""Commands that show runs to people: one as a page, several beside each other, all below a folder."""
