"""From test images to figures: metrics of a run, and the HTML page of several."""
