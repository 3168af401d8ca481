{{- define "jouletrace.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "jouletrace.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "jouletrace.name" .) .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name (include "jouletrace.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "jouletrace.selector" -}}
app.kubernetes.io/name: {{ include "jouletrace.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* The daemon's own pods; the test's pod has another component. */ -}}
{{- define "jouletrace.daemon" -}}
{{ include "jouletrace.selector" . }}
app.kubernetes.io/component: daemon
{{- end }}

{{- define "jouletrace.labels" -}}
{{ include "jouletrace.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "jouletrace.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "jouletrace.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "jouletrace.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- /* Names of the Secrets that are mounted; empty for none. */ -}}
{{- define "jouletrace.tokenSecret" -}}
{{- if .Values.ingest.token.existingSecret -}}
{{ .Values.ingest.token.existingSecret }}
{{- else if .Values.ingest.token.value -}}
{{ include "jouletrace.fullname" . }}-token
{{- end }}
{{- end }}

{{- define "jouletrace.webSecret" -}}
{{- if .Values.web.existingSecret -}}
{{ .Values.web.existingSecret }}
{{- else if .Values.web.config -}}
{{ include "jouletrace.fullname" . }}-web
{{- end }}
{{- end }}

{{- /* Folders of the node by which pods are named; empty for none. */ -}}
{{- define "jouletrace.kubeletFolder" -}}
{{- if .Values.attribution.pods }}{{ .Values.attribution.kubeletSocketDirectory }}{{ end }}
{{- end }}

{{- define "jouletrace.podLogsFolder" -}}
{{- if .Values.attribution.pods }}{{ .Values.attribution.podLogsDirectory }}{{ end }}
{{- end }}

{{- /* The kubelet's socket and other users' open files are for user 0 only; names of folders in the pod logs are for all. */ -}}
{{- define "jouletrace.user" -}}
{{- if or (include "jouletrace.kubeletFolder" .) .Values.attribution.discoverEngines }}0{{ else }}65532{{ end }}
{{- end }}

{{- define "jouletrace.group" -}}
{{- if .Values.ingest.sockets.enabled }}{{ .Values.ingest.sockets.group | int }}{{ else }}65532{{ end }}
{{- end }}

{{- /* The daemon's ports by name, as YAML; a listener on a Unix socket has none. */ -}}
{{- define "jouletrace.ports" -}}
metrics: 9841
{{- $config := .Values.config }}
{{- $listeners := dict "metrics-only" (dig "web" "metrics_listen_address" list $config) "records" (dig "ingest" "listen_address" list $config) "otlp" (dig "otlp" "listen_address" list $config) "otlp-grpc" (dig "otlp" "grpc_listen_address" list $config) }}
{{- range $name, $addresses := $listeners }}
{{- with $addresses | first | default "" | regexFind ":[0-9]+$" }}
{{ $name }}: {{ trimPrefix ":" . }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The daemon's configuration: the operator's keys and those that follow from other values. */ -}}
{{- define "jouletrace.config" -}}
{{- $ingest := dict "stream_socket" "off" "datagram_socket" "off" }}
{{- if .Values.ingest.sockets.enabled }}
{{- $ingest = dict "stream_socket" "/run/jouletrace/ingest.sock" "datagram_socket" "/run/jouletrace/ingest.dgram" "socket_access" "group" }}
{{- end }}
{{- if include "jouletrace.tokenSecret" . }}
{{- $_ := set $ingest "token_file" "/etc/jouletrace/token/token" }}
{{- end }}
{{- $web := dict "listen_address" (list ":9841") }}
{{- if include "jouletrace.webSecret" . }}
{{- $_ := set $web "config" (dict "file" "/etc/jouletrace/web/web-config.yml") }}
{{- end }}
{{- $own := dict "state_dir" "/var/lib/jouletrace" "web" $web "ingest" $ingest "engines" (dict "discover" .Values.attribution.discoverEngines) }}
{{- if .Values.attribution.pods }}
{{- $socket := ternary "" "/var/lib/kubelet/pod-resources/kubelet.sock" (empty .Values.attribution.kubeletSocketDirectory) }}
{{- $logs := ternary "" "/var/log/pods" (empty .Values.attribution.podLogsDirectory) }}
{{- $_ := set $own "workloads" (dict "processes" true "pods" true "pod_resources_socket" $socket "pod_logs_dir" $logs) }}
{{- end }}
{{- mustMergeOverwrite (deepCopy .Values.config) $own | toYaml }}
{{- end }}

{{- /* How the kubelet asks for a page: health and readiness need no password, but may need a certificate. */ -}}
{{- define "jouletrace.probe" -}}
{{- $tls := .Values.web.config.tls_server_config }}
{{- if or .Values.web.existingSecret (and $tls (ne (dig "client_auth_type" "NoClientCert" ($tls | default dict)) "NoClientCert")) -}}
tcpSocket: {port: metrics}
{{- else -}}
httpGet: {path: {{ .path }}, port: metrics, scheme: {{ ternary "HTTPS" "HTTP" (not (empty $tls)) }}}
{{- end }}
{{- end }}
