"""The output contract of the client programs, for those written in Python (see ../doc.go)."""

import json
import os
import sys
import threading
import time

TIMEOUT = float(os.environ.get("FETCH_TIMEOUT", "20"))


def _report(client, **fields):
    line = {"client": client, "ok": False, "access_key_id": "", "expiration": "", "seconds": 0, "error": ""}
    line.update(fields)
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _hang(client):
    _report(client, seconds=TIMEOUT, error="hang: no result within %g s" % TIMEOUT)
    os._exit(3)


def run(client, fetch):
    """Fetches once, and once more per line on stdin. fetch returns (access key id, expiration)
    or raises what the client raised; a result that never comes is reported and ends with 3."""
    while True:
        watchdog = threading.Timer(TIMEOUT, _hang, [client])
        watchdog.daemon = True
        watchdog.start()
        start = time.monotonic()
        try:
            key, expiration = fetch()
            fields = {"ok": True, "access_key_id": key, "expiration": str(expiration)}
        except Exception as e:
            fields = {"error": "%s: %s" % (type(e).__name__, e)}
        watchdog.cancel()
        _report(client, seconds=round(time.monotonic() - start, 3), **fields)
        if not sys.stdin.readline():
            return
