{{/*
Text is written with `quote` and numbers with `toJson`: plain, YAML reads `a: b` as a mapping, ` #` as
a comment, `on` and `1e3` as no text, and Go prints 1000000 as 1e+06. Objects and lists go through
`toYaml`, which quotes what needs it; where it fails, it writes nothing (see pt.check).
*/}}
{{- define "pt.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "pt.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "pt.metadata" -}}
namespace: {{ .Release.Namespace | quote }}
labels:
  {{- include "pt.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
  helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
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

{{/* An argument that reaches vLLM as it is: Kubernetes replaces $(NAME) and $$ in arguments. */}}
{{- define "pt.argument" -}}
{{- . | replace "$" "$$" | quote }}
{{- end }}

{{/*
What engine.env may replace. The root filesystem is read-only: weights go to the cache, compiled code
to /tmp.
*/}}
{{- define "pt.environment" -}}
VLLM_NO_USAGE_STATS: "1"
HF_HOME: /models/huggingface
HOME: /tmp
XDG_CACHE_HOME: /tmp/cache
VLLM_CACHE_ROOT: /tmp/cache/vllm
{{- if not .Values.gpu.enabled }}
VLLM_CPU_KVCACHE_SPACE: {{ .Values.cpuKVCacheGiB | toJson | quote }}
{{- end }}
{{- end }}

{{- define "pt.refuseOwn" -}}
{{- range $name, $_ := .given }}
{{- if has $name $.own }}
{{- fail (printf "%s: %s is set by the chart; take another name" $.key $name) }}
{{- end }}
{{- end }}
{{- end }}

{{/* What the schema cannot say: it sees keys one by one, and defaults beside them. */}}
{{- define "pt.check" -}}
{{- if not (toYaml .Values) }}{{/* empty where it fails: a list would be left out without a word */}}
{{- fail "values: a text holds a control character (U+007F to U+009F or U+FFFE) that YAML cannot carry" }}
{{- end }}
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
{{- $own := keys (include "pt.metadata" . | fromYaml).labels }}
{{- include "pt.refuseOwn" (dict "key" "podLabels" "given" .Values.podLabels "own" $own) }}
{{- range $part, $settings := .Values.monitoring }}
{{- include "pt.refuseOwn" (dict "key" (printf "monitoring.%s.labels" $part) "given" $settings.labels "own" $own) }}
{{- end }}
{{- include "pt.refuseOwn" (dict "key" "podAnnotations" "given" .Values.podAnnotations "own" (list "checksum/api-key")) }}
{{- if and (eq (int .Values.strategy.maxSurge) 0) (eq (int .Values.strategy.maxUnavailable) 0) }}
{{- fail "strategy: maxSurge and maxUnavailable are both 0; one of them must be at least 1" }}
{{- end }}
{{- end }}
