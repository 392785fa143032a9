"""Code generation: from a rewritten Program to step graphs that run (eager, Inductor, ONNX)."""

if __name__ != "ditopt.codegen":
    raise ImportError("import this package as ditopt.codegen; its folder is not a package of its own")
