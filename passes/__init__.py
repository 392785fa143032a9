"""Passes: one file each. A pass takes a Program and returns a new one; adding a pass edits no other file."""

if __name__ != "ditopt.passes":
    raise ImportError("import this package as ditopt.passes; its folder is not a package of its own")
