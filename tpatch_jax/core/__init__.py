"""Arrays only: patches, how they join a feed-forward network, what they are fitted on, and the fit itself."""
