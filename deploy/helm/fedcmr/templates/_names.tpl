{{- define "fedcmr.name" -}}
{{ printf "%s-%s" .Release.Name .Values.role | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "fedcmr.selector" -}}
app.kubernetes.io/name: fedcmr
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: {{ .Values.role }}
{{- end }}

{{- define "fedcmr.labels" -}}
{{ include "fedcmr.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "fedcmr.image" -}}
{{- $repository := .Values.image.repository | default (printf "fedcmr-%s" .Values.role) -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{ printf "%s%s%s" $repository (ternary "@" ":" (hasPrefix "sha256:" $tag)) $tag }}
{{- end }}

{{/* One pod alone may use a claim: two agents on one ledger would spend its budget twice. */}}
{{- define "fedcmr.claim" -}}
metadata:
  name: {{ .name }}
spec:
  accessModes: [ReadWriteOncePod]
  {{- with .volume.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources:
    requests:
      storage: {{ .volume.size }}
{{- end }}
