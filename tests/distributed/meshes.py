"""One mesh a process for each set of degrees.

A mesh is some seven process groups, and a group of gloo is threads and sockets that nothing gives back. The processes
of `harness.py` run hundreds of jobs, which would have thousands of them.
"""

import functools

from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.mesh import ParallelMesh, build_mesh


@functools.cache
def mesh_of(degrees: MeshDegrees, device_type: str) -> ParallelMesh:
    """`build_mesh`, once."""
    return build_mesh(degrees, device_type)
