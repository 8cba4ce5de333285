"""OpenVINO: the backend, and what is changed in a graph before it is compiled."""
