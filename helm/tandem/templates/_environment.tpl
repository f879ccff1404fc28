{{- define "tandem.environmentTokenSecret" -}}
{{ default (printf "%s-environment-token" (include "tandem.fullname" .)) .Values.environment.token.existingSecret }}
{{- end }}

{{- /* The volume with the token of the environment's pods. Only they and the trainer mount it. */}}
{{- define "tandem.environmentTokenVolume" -}}
- name: environment-token
  secret:
    secretName: {{ include "tandem.environmentTokenSecret" . }}
    items: [{key: {{ .Values.environment.token.key }}, path: token}]
    defaultMode: 0440
{{- end }}

{{- /* The pod template. It restarts after a change of the configuration or the project, as the trainer does. */}}
{{- define "tandem.environmentPod" -}}
{{- $options := .Values.environment -}}
metadata:
  labels:
    {{- include "tandem.podLabels" (list . "environment" $options) | nindent 4 }}
    tandem/environment-config: {{ include "tandem.trainerHash" . | quote }}
  {{- with $options.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "tandem.podOptions" (list . $options) | nindent 2 }}
  terminationGracePeriodSeconds: 30
  initContainers:
    - name: project  # waits for the project, which the trainer's pod prepares
      image: {{ include "tandem.image" $options.image }}
      imagePullPolicy: {{ $options.image.pullPolicy }}
      command: {{- include "tandem.shell" . | nindent 8 }}
        - |
          {{- include "tandem.waitForProject" . | nindent 10 }}
      env: {{- include "tandem.projectEnv" (list . (include "tandem.trainerHash" .)) | nindent 8 }}
      {{- include "tandem.smallResources" . | nindent 6 }}
      {{- include "tandem.securityContext" . | nindent 6 }}
      volumeMounts:
        - {name: cache, mountPath: /cache, readOnly: true}
    {{- with $options.extraInitContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  containers:
    - name: environment
      image: {{ include "tandem.image" $options.image }}
      imagePullPolicy: {{ $options.image.pullPolicy }}
      args: [--config, {{ include "tandem.projectDir" . }}/config.yaml]
      env:
        - name: TANDEM_ENVIRONMENT_TOKEN_FILE
          value: /environment-secrets/token
        - name: HF_HUB_OFFLINE
          value: "1"
        {{- with include "tandem.extraEnv" $options }}
        {{- . | nindent 8 }}
        {{- end }}
      ports:
        - {name: http, containerPort: 8100}
      startupProbe:
        httpGet: {path: /healthz, port: http}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: 150
      readinessProbe:
        httpGet: {path: /healthz, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:  # restarts a process in which the project's code blocks the event loop
        httpGet: {path: /healthz, port: http}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      lifecycle:
        preStop:  # time for the Service to remove this pod's address
          exec: {command: [sleep, "5"]}
      resources: {{- include "tandem.resources" (dict "resources" $options.resources "tmpSize" $options.tmpSize "shmSize" "0" "accelerator" (dict "count" 0)) | nindent 8 }}
      {{- include "tandem.securityContext" . | nindent 6 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: environment-token, mountPath: /environment-secrets, readOnly: true}
        - {name: cache, mountPath: /cache, readOnly: true}
        {{- with $options.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $options.tmpSize }}}
    - name: cache
      persistentVolumeClaim: {claimName: {{ include "tandem.claimName" (list . "cache") }}}
    {{- include "tandem.environmentTokenVolume" . | nindent 4 }}
    {{- with $options.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
