{{- /* A PersistentVolumeClaim; (list $ name). */}}
{{- define "tandem.claim" -}}
{{- $ := index . 0 }}{{ $name := index . 1 }}{{ $storage := get $.Values.storage $name -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "tandem.claimName" . }}
  labels: {{- include "tandem.labels" (list $ $name) | nindent 4 }}
  {{- if eq $name "runs" }}
  annotations:
    helm.sh/resource-policy: keep  # checkpoints and metrics cannot be made again
  {{- end }}
spec:
  accessModes: [{{ $storage.accessMode }}]
  {{- with $storage.storageClassName }}
  storageClassName: {{ . }}
  {{- end }}
  resources:
    requests:
      storage: {{ $storage.size }}
{{- end }}

{{- define "tandem.claimName" -}}
{{- $ := index . 0 -}}
{{ default (printf "%s-%s" (include "tandem.fullname" $) (index . 1)) (get $.Values.storage (index . 1)).existingClaim }}
{{- end }}

{{- /* Not empty if a claim that both services mount is ReadWriteOnce: then all pods must run on one node. */}}
{{- define "tandem.oneNode" -}}
{{- if has "ReadWriteOnce" (list .Values.storage.weights.accessMode .Values.storage.cache.accessMode) }}yes{{ end }}
{{- end }}
