"""A clip from Triton in thirty lines: python client.py PROMPT FILE.mp4 [HOST:PORT]"""

import json
import sys
from queue import SimpleQueue

import numpy as np
import tritonclient.grpc as triton  # pip install 'tritonclient[grpc]'

prompt, output, address = [*sys.argv[1:4], "localhost:8001"][:3]
answers = SimpleQueue()


def tensor(name, kind, value):
    made = triton.InferInput(name, [1], kind)
    made.set_data_from_numpy(np.array([value], triton.triton_to_np_dtype(kind)))
    return made


with triton.InferenceServerClient(address) as client:
    client.start_stream(lambda result, error: answers.put((result, error)))
    inputs = [tensor("prompt", "BYTES", prompt.encode()), tensor("seed", "INT64", 7)]
    client.async_stream_infer("ltx_video", inputs)
    event = {}
    while event.get("event") != "done":
        result, error = answers.get()
        if error:
            sys.exit(str(error))
        print(event := json.loads(result.as_numpy("event")[0]))
with open(output, "wb") as file:
    file.write(result.as_numpy("video")[0])
