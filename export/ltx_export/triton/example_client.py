"""A clip from Triton in thirty lines: python client.py PROMPT FILE.mp4 [HOST:PORT]"""

import json
import sys
from queue import SimpleQueue
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # pip install 'tritonclient[grpc]'

prompt, output, address = [*sys.argv[1:4], "localhost:8001"][:3]
answers: SimpleQueue[Any] = SimpleQueue()
event: dict[str, Any] = {}
inputs = []
for name, kind, value in (("prompt", "BYTES", prompt.encode()), ("seed", "INT64", 7)):
    inputs.append(triton.InferInput(name, [1], kind))
    inputs[-1].set_data_from_numpy(np.array([value], triton.triton_to_np_dtype(kind)))

with triton.InferenceServerClient(address) as client:
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("ltx_video", inputs)
    while event.get("event") != "done":
        result, error = answers.get()
        if error:
            sys.exit(str(error))
        event = json.loads(result.as_numpy("event")[0])
        print(event)
with open(output, "wb") as file:
    file.write(result.as_numpy("video")[0])
