{{/* The agent's health page is on the pod's loopback, where only a command in the pod can ask. */}}
{{- define "fedcmr.probes.site" -}}
startupProbe:
  exec:
    command: [answers, "http://127.0.0.1:{{ .Values.healthPort }}/healthz"]
  timeoutSeconds: 10
  periodSeconds: 10
  # The whole ledger is checked first.
  failureThreshold: 60
livenessProbe:
  exec:
    command: [answers, "http://127.0.0.1:{{ .Values.healthPort }}/healthz"]
  timeoutSeconds: 10
  periodSeconds: 30
readinessProbe:
  exec:
    command: [answers, "http://127.0.0.1:{{ .Values.healthPort }}/readyz"]
  timeoutSeconds: 10
  periodSeconds: 30
{{- end }}

{{/* Alive is who listens: a database that is away for a while is no reason to start anew. */}}
{{- define "fedcmr.probes.coordinator" -}}
startupProbe:
  tcpSocket:
    port: federation
  periodSeconds: 5
  failureThreshold: 60
livenessProbe:
  tcpSocket:
    port: federation
  periodSeconds: 30
readinessProbe:
  exec:
    command: [answers, "https://127.0.0.1:8443/healthz"]
  timeoutSeconds: 10
  periodSeconds: 10
{{- end }}
