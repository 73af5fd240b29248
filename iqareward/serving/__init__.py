"""The reward server: the rewards of this library behind HTTP, on Ray Serve. Needs the extra `serve`.

`gate.py` decides who may send how much, `memory.py` counts it, `app.py` speaks HTTP, `pictures.py` and
`plain_pickle.py` read foreign bytes, `legacy.py` answers the clients of other code bases, `dispatch.py` splits a
request over rewards and replicas, `replica.py` holds one reward, `sleeping.py` knows whether it sleeps, and
`application.py` puts all of it on Ray.
"""

from iqareward.optional import require

require("fastapi", extra="serve", purpose="iqareward.serving")
