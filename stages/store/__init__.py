"""The scene store: content-addressed blobs (CAS) and an action cache (AC), after Bazel's remote execution API.

It knows digests and actions, nothing of scenes, stages or recordings.
"""
