{{- define "pt.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "pt.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pt.metadata" -}}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "pt.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .Release.Service }}
  helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "pt.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "pt.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "pt.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "pt.keySecret" -}}
{{- .Values.apiKey.existingSecret | default (printf "%s-api-key" (include "pt.name" .)) }}
{{- end }}

{{- define "pt.cacheClaim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" (include "pt.name" .)) }}
{{- end }}

{{/* What the schema cannot say: it sees keys one by one, and defaults beside them. */}}
{{- define "pt.check" -}}
{{- $key := .Values.apiKey }}
{{- if and $key.enabled (not $key.existingSecret) (not $key.value) }}
{{- fail "apiKey: give existingSecret (a Secret with the key) or value; apiKey.enabled=false serves everybody who reaches the port" }}
{{- end }}
{{- if and $key.existingSecret $key.value }}
{{- fail "apiKey: existingSecret and value are both set; give one" }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "autoscaling: minReplicas (%d) is above maxReplicas (%d)" (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- end }}
{{- $most := ternary .Values.autoscaling.maxReplicas .Values.replicas .Values.autoscaling.enabled | int }}
{{- with .Values.cache }}
{{- if and (eq .type "pvc") (not .existingClaim) (eq .accessMode "ReadWriteOnce") (gt $most 1) }}
{{- fail (printf "cache: %d replicas cannot share a ReadWriteOnce volume; use accessMode ReadWriteMany, or type emptyDir" $most) }}
{{- end }}
{{- end }}
{{- if and (eq (int .Values.strategy.maxSurge) 0) (eq (int .Values.strategy.maxUnavailable) 0) }}
{{- fail "strategy: maxSurge and maxUnavailable are both 0; one of them must be at least 1" }}
{{- end }}
{{- end }}
