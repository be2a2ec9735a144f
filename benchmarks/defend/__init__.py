"""What protects a release from recovery, measured on a real model."""
