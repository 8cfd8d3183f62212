"""An HTTP server in front of the version store: Open Inference Protocol v2, images, a page.

Needs the `server` extra; never imports torch. What a request goes through:

    gate (who, how much, how long) → inference or classify → models → batching → one loaded version
"""
