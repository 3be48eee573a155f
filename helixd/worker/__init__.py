"""The worker role: joins a coordinator, loads layers, runs stages, passes activations on."""
