"""The governance service's interface: ``governance.proto``, and what protoc makes of it.

After a change of the interface::

    python -m grpc_tools.protoc -I shared --python_out=shared --pyi_out=shared \
        --grpc_python_out=shared shared/fedcmr_shared/governance/governance.proto
"""
