{{- /* Fields that every pod's spec has; (list $ options). `options` is .Values.generator or .Values.trainer. */}}
{{- define "tandem.podOptions" -}}
{{- $ := index . 0 }}{{ $options := index . 1 -}}
serviceAccountName: {{ include "tandem.fullname" $ }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- if include "tandem.oneNode" $ }}
affinity:
  podAffinity:  # a claim is ReadWriteOnce, so only one node can mount it
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "tandem.selector" (list $ "generator") | nindent 12 }}
{{- end }}
{{- with $options.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $options.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $options.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $options.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "tandem.securityContext" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- /* Resources of containers that only wait. */}}
{{- define "tandem.smallResources" -}}
resources:
  requests: {cpu: 50m, memory: 64Mi}
  limits: {cpu: "1", memory: 256Mi}
{{- end }}

{{- /* The start of a command that runs a script. tini passes a signal to every process of the script; sh as PID 1 ignores it. */}}
{{- define "tandem.shell" -}}
- tini
- -g
- --
- sh
- -ec
{{- end }}

{{- /* A shell script that fails if it cannot write to a volume; a list of mount points. fsGroup has no effect on some volumes. */}}
{{- define "tandem.checkVolumes" -}}
for volume in {{ join " " . }}; do
  if ! file=$(mktemp $volume/.writable.XXXXXX 2>&1); then
    echo "error: $volume (owner $(stat -c '%u:%g, mode %a' $volume)): got \"${file##*: }\", expected a volume that user 10001 may write to. NFS, hostPath and some CSI drivers ignore fsGroup. Fix: run chown 10001:10001 on its folder, on the server or on the node" >&2
    exit 1
  fi
  rm -f "$file"
done
{{- end }}

{{- /*
Where the trainer's pod puts the project, and the marker that it writes when the project is complete; (list $ hash). The
generators wait for the first part of the trainer's marker.
*/}}
{{- define "tandem.projectEnv" -}}
- name: TANDEM_PROJECT_DIR
  value: /cache/project
- name: TANDEM_PREPARED
  value: {{ index . 1 }}
{{- end }}

{{- /* A shell script that waits for this marker. */}}
{{- define "tandem.waitForProject" -}}
for _ in $(seq {{ div .Values.generator.startupBudgetSeconds 2 }}); do
  case "$(cat $TANDEM_PROJECT_DIR/.prepared 2>/dev/null)" in "$TANDEM_PREPARED"*) exit 0 ;; esac
  sleep 2
done
echo "error: the project was not ready within {{ .Values.generator.startupBudgetSeconds }} s (generator.startupBudgetSeconds). Fix: read the log of the container 'prepare' in the trainer's pod, which prepares it" >&2
exit 1
{{- end }}

{{- define "tandem.tokenSecret" -}}
{{ default (printf "%s-token" (include "tandem.fullname" .)) .Values.token.existingSecret }}
{{- end }}

{{- define "tandem.serviceEnv" -}}
- name: TANDEM_TOKEN_FILE
  value: /secrets/token
- name: TANDEM__SHARED__GENERATORS
  value: '["http://{{ include "tandem.fullname" . }}-generator:8000"]'
{{- end }}

{{- define "tandem.tokenVolume" -}}
- name: token
  secret:
    secretName: {{ include "tandem.tokenSecret" . }}
    items: [{key: {{ .Values.token.key }}, path: token}]
    defaultMode: 0440
{{- end }}

{{- /* Volumes that the pods of both services have; (list $ options). */}}
{{- define "tandem.volumes" -}}
{{- $ := index . 0 -}}
- name: tmp
  emptyDir: {sizeLimit: {{ (index . 1).tmpSize }}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ (index . 1).shmSize }}}
{{ include "tandem.tokenVolume" $ }}
- name: weights
  persistentVolumeClaim: {claimName: {{ include "tandem.claimName" (list $ "weights") }}}
- name: cache
  persistentVolumeClaim: {claimName: {{ include "tandem.claimName" (list $ "cache") }}}
{{- end }}
