"""The evaluation harness: data sets as records of probes, and the published figures over the probes' scores."""
