"""Runs an exported control step in a Python that cannot import this project: python foreign.py FOLDER SEEN.npz OUT.npz

SEEN.npz: per camera uint8[n, height, width, 3], and sensor readings under the names of program.json, [n, ...].
"""

import json
import pathlib
import sys

import numpy as np
from PIL import Image
from safetensors import safe_open


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("robovlms_jax", "experiments", "tests"):
            raise ImportError(f"{name} is not here")


def resized(pixels, how):
    method = getattr(Image.Resampling, how["filter"].upper())
    columns = Image.fromarray(pixels).resize((how["size"], pixels.shape[0]), method)
    return np.asarray(columns.resize((how["size"], how["size"]), method))


def stablehlo(folder, about, tensors):
    import jax.export

    call = jax.jit(jax.export.deserialize((folder / "program.stablehlo").read_bytes()).call)
    weights = [tensors[entry["name"]] for entry in about["inputs"] if entry["what"] == "weight"]
    names = [entry["name"] for entry in about["inputs"] if entry["what"] != "weight"]
    return lambda values: dict(zip(about["outputs"], call(*weights, *(values[name] for name in names))))


def onnx(folder, about, tensors):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "program.onnx", options)
    return lambda values: named(zip([x.name for x in session.get_outputs()], session.run(None, values)))


def litert(folder, about, tensors):
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(folder / "program.tflite")).get_signature_runner("step")
    return lambda values: named(run(**values).items())


def named(results):
    return {name.removeprefix("next_"): value for name, value in results}


def main(folder, seen, out):
    about = json.loads((folder / "program.json").read_text())
    with safe_open(folder / "tensors.safetensors", "flax" if about["program"]["kind"] == "stablehlo" else "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    step = globals()[about["program"]["kind"]](folder, about, tensors)
    carry = {entry["name"]: tensors[entry["name"]] for entry in about["inputs"] if entry["what"] == "carry"}
    tokens = about["instructions"]["open the drawer"]
    text = {
        entry["name"]: np.array([tokens[entry["name"]]], entry["dtype"])
        for entry in about["inputs"]
        if entry["what"].startswith("text")
    }
    actions = []
    for index in range(len(next(iter(seen.values())))):
        frame = {name: values[index] for name, values in seen.items()}
        images = {name: resized(x, about["resize"])[None] for name, x in frame.items() if name.startswith("image_")}
        sensors = {name: x[None] for name, x in frame.items() if not name.startswith("image_")}
        if "sensor_action_history" in sensors and actions:  # what was planned was done
            done = [chunk[0] for chunk in actions[-sensors["sensor_action_history"].shape[1] :]]
            sensors["sensor_action_history"][0, -len(done) :] = done
        results = step({**carry, **text, **images, **sensors})
        actions.append(np.asarray(results.pop("actions"))[0])
        carry = results
    np.savez(out, actions=np.stack(actions))


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())
    sys.path = [path for path in sys.path if path]
    main(pathlib.Path(sys.argv[1]), dict(np.load(sys.argv[2])), sys.argv[3])
