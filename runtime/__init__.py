"""The runtime: runs step graphs, keeps the state of a request, decides once a step. Knows no pass and no compiler."""

if __name__ != "ditopt.runtime":
    raise ImportError("import this package as ditopt.runtime; its folder is not a package of its own")
