"""How good and how fast a river is: fidelity, calibration, sensitivity, benchmarks, and their pages and plots."""
