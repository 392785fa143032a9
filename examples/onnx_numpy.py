"""Sample from an exported model with NumPy and onnxruntime alone: onnx_numpy.py dit.json --steps 30 --out x.npy"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

_TYPE = {float: "f", int: "q"}


def run(path: Path, seed: int, sigmas: np.ndarray, prompt: dict[str, np.ndarray]) -> np.ndarray:
    """Euler flow matching along sigmas, one more than steps; prompt: the inputs that no step changes, by name."""
    m = json.loads(path.read_text())
    graphs = {g["name"]: (g, ort.InferenceSession(path.parent / g["file"])) for g in m["graphs"] + m["memo_graphs"]}
    if m["decisions"] and "schedule" not in m["extra"]:
        raise ValueError(f"{path} was exported without a schedule: it decides by what it measures; use ditopt.load")
    plan = m["extra"].get("schedule") or [{"graph": m["graphs"][0]["name"], "weights": {}}] * (len(sigmas) - 1)
    zeros = {i["name"]: np.zeros(i["type"]["shape"], i["type"]["dtype"]) for i in m["inputs"] + m["state"]}
    have = {"memo": {}, "input": zeros | prompt, "state": zeros}
    latent, time = (next(i["name"] for i in m["inputs"] if i["role"] == role) for role in ("latent", "timestep"))
    x = np.asarray(np.random.default_rng(seed).standard_normal(zeros[latent].shape, np.float32))
    for k, (step, sigma) in enumerate(zip(plan, sigmas[:-1], strict=True)):
        have["input"] |= {latent: x, time: np.full_like(zeros[time], 1000 * sigma)}
        have["control"] = {name: np.array(w, _TYPE[type(w[0])]) for name, w in step["weights"].items()}
        memos = [(o["function"], o["values"]) for o in m["memos"] if k == 0 or o["lifetime"] == "schedule"]
        for name, values in [*memos, (step["graph"], ())]:  # by position: the manifest says what graph inputs stand for
            g, net = graphs[name]
            feed = {i.name: have[f["kind"]][f["ref"]] for i, f in zip(net.get_inputs(), g["inputs"], strict=True)}
            have["memo"] |= zip(values, out := net.run(None, feed), strict=False)
        s = have["state"]
        have["state"] = s | {u["slot"]: out[u["output"]] if u["output"] >= 0 else s[u["source"]] for u in g["updates"]}
        x = x + np.float32(sigmas[k + 1] - sigma) * out[0]
    return x


if __name__ == "__main__":
    cli = argparse.ArgumentParser()
    for flag, value in {"manifest": "", "--steps": 30, "--seed": 0, "--out": "x.npy", "--prompt": ""}.items():
        cli.add_argument(flag, type=type(value), default=value)  # --prompt: an .npz of the inputs that no step changes
    a = cli.parse_args()
    prompt, sigmas = dict(np.load(a.prompt)) if a.prompt else {}, np.append(np.linspace(1, 1e-3, a.steps), 0)
    np.save(a.out, run(Path(a.manifest), a.seed, sigmas, prompt))
