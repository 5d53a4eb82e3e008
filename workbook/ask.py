"""Ask a model server steadily, by a policy of gRPC's, and print how many requests have failed.

    python -c "$(cat workbook/ask.py)" dns:///model-server:8500 round_robin 10 clothing-model

Lesson 08 runs this inside a gateway's pod, which has nothing of the workbook: it needs only what
the gateway has. The policy is `pick_first` or `round_robin`, the number is of seconds.
"""

import json
import os
import sys
import time

import grpc
import numpy as np

import description
import tfserving
from tfserving.channel import OPTIONS, SERVICE_CONFIG

target, policy, seconds, model_name = sys.argv[1:]
model = description.read(os.environ.get("MODEL_DESCRIPTION", description.BUNDLED))
pb_request = tfserving.PredictRequest()
pb_request.model_spec.name = model_name
pb_request.model_spec.signature_name = "serving_uint8"
pixels = np.zeros((1, model.height, model.width, 3), np.uint8)
pb_request.inputs["pixels"].CopyFrom(tfserving.make_tensor_proto(pixels))

config = SERVICE_CONFIG | {"loadBalancingConfig": [{policy: {}}]}
options = [("grpc.service_config", json.dumps(config)), *OPTIONS[1:]]
several = f"ipv4:{target}" if "," in target else target
stub = tfserving.PredictionServiceStub(grpc.insecure_channel(several, options))

end, failed = time.time() + float(seconds), 0
while time.time() < end:
    try:
        stub.Predict(pb_request, timeout=10)
    except grpc.RpcError:
        failed += 1
    time.sleep(0.02)
print(failed)
