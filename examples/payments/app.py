"""The payments API of the demo, as an app of your own would start it: `uvicorn app:app`."""

from retryproof.demo.app import create_app

app = create_app("payments.db")
