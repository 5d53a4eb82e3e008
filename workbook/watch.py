"""Write down how many gRPC requests model servers have answered, three times a second, for ever.

    python -c "$(cat workbook/watch.py)" localhost:8501 localhost:8521

Each line holds the server's number, the time and the count. Lesson 05 runs this inside a container
that has nothing of the workbook, so it stands alone.
"""

import re
import sys
import time
import urllib.request

while True:
    for server, address in enumerate(sys.argv[1:], 1):
        try:
            url = f"http://{address}/monitoring/prometheus/metrics"
            page = urllib.request.urlopen(url, timeout=1).read().decode()
        except OSError:
            continue
        counts = re.findall(r"request_latency_count{.*GRPC.*} (\d+)", page)  # no health checks
        print(f"{server} {time.time()} {sum(map(int, counts))}", flush=True)
    time.sleep(0.3)
