"""The server that RL code bases have today: Flask, a pickle of JPEG files in, one request after the other.

    python -m benchmarks._serving_flask --port 8001 --config wide --threads 2

One process that takes one request at a time, as a synchronous gunicorn worker does; `--threaded` = as `app.run()` does,
every request in a thread of its own.
"""

import argparse
import io
import pickle

from flask import Flask, request
from PIL import Image

from benchmarks._serving_judge import Judge
from iqareward.images import to_images


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--threaded", action="store_true")
    options = parser.parse_args()
    judge = Judge(options.config, options.threads, 32)
    judge(to_images(Image.new("RGB", (64, 64))))
    app = Flask(__name__)

    @app.post("/")
    def score() -> bytes:
        files = pickle.loads(request.get_data())["images"]  # the hole this benchmark is about: for our own client only
        pictures = [Image.open(io.BytesIO(file)) for file in files]
        return pickle.dumps({"outputs": judge(to_images(pictures)).tolist()})

    app.run(host="127.0.0.1", port=options.port, threaded=options.threaded)


if __name__ == "__main__":
    main()
