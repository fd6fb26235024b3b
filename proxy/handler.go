package proxy

import (
	"errors"
	"io"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/imdsgate/imdsgate/cache"
)

// The addresses of the metadata endpoint, the only ones that a Host header may name.
const (
	MetadataIPv4 = "169.254.169.254"
	MetadataIPv6 = "fd00:ec2::254"
)

const (
	metaData = "/latest/meta-data/"
	roleList = metaData + "iam/security-credentials"

	tokenHeader    = "X-Aws-Ec2-Metadata-Token"
	tokenTTLHeader = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"

	get = "GET, HEAD"
	put = "PUT"
)

// route is one entry of the table. Exactly one of its functions is set. What a function needs to have been checked before
// it may run is its arguments: it cannot be called, and so cannot answer, without.
type route struct {
	handler handlerLabel
	allow   string // methods, as in the Allow header
	direct  bool   // X-Forwarded-For is 403: a proxy inside the pod must not fetch this for somebody else

	token func(request) answer                  // depends on nothing at all
	open  func(request) answer                  // the session token is checked
	pod   func(request, *Caller) answer         // and the pod is identified
	role  func(request, *Caller, *Grant) answer // and its role is authorized
}

// routes is the table: a request's raw target is looked up byte for byte. There is no other way in.
type routes struct {
	exact map[string]*route
	role  *route // the names below roleList
	macs  []macRoute
}

func newRoutes(allow []string) (routes, error) {
	t := routes{
		exact: map[string]*route{
			"/":                    {handler: handlerRoot, allow: get, open: request.root},
			"/latest/api/token":    {handler: handlerToken, allow: put, direct: true, token: request.token},
			roleList:               {handler: handlerRoleList, allow: get, role: request.roleList},
			roleList + "/":         {handler: handlerRoleList, allow: get, role: request.roleList},
			metaData + "iam/info":  {handler: handlerInfo, allow: get, role: request.info},
			metaData + "iam/info/": {handler: handlerInfo, allow: get, role: request.info},
		},
		role: &route{handler: handlerDocument, allow: get, direct: true, role: request.document},
	}
	for _, path := range passthrough() {
		t.pass(metaData + path)
	}
	for _, a := range allow {
		path, err := canonicalAllow(a)
		if err != nil {
			return routes{}, err
		}
		t.pass(path)
	}
	return t, nil
}

// match finds the entry for a raw request target, and what follows the prefix of an entry that has one.
func (t *routes) match(target string) (rt *route, name string) {
	path := target
	if rest, ok := strings.CutPrefix(target, "http://"); ok { // absolute form; the Host check has read its authority
		end := strings.IndexAny(rest, "/?")
		if end < 0 {
			end = len(rest)
		}
		if end == 0 || !allowedHost(rest[:end]) {
			return nil, ""
		}
		if path = rest[end:]; path == "" || path[0] == '?' {
			path = "/" + path
		}
	}
	path, _, _ = strings.Cut(path, "?")
	if rt := t.exact[path]; rt != nil {
		return rt, ""
	}
	if name, ok := strings.CutPrefix(path, roleList+"/"); ok {
		return t.role, name
	}
	for i := range t.macs {
		if mac, ok := t.macs[i].match(path); ok {
			return t.macs[i].route, mac
		}
	}
	return nil, ""
}

// request is what is known of a request before its caller is. It is passed by value: a pointer would be an allocation.
type request struct {
	s     *Server
	r     *http.Request
	ip    netip.Addr
	conn  *conn  // nil without Serve
	name  string // what followed the entry's prefix
	start time.Time
	held  bool // had to wait for its caller
}

// answer is what goes to the pod: the role list's text, a ready body, or an error for status.
type answer struct {
	text   string
	body   []byte
	ttl    string // of the session token in text
	err    error
	caller *Caller
	waited bool // not answered from memory alone
}

// serve is the only place that answers.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	ip, conn := peer(r)
	q := request{s: s, r: r, ip: ip, conn: conn, start: time.Now()}
	rt, name := s.routes.match(r.RequestURI)
	q.name = name
	a := q.answer(rt)
	code := s.write(w, q, rt, a)
	label := handlerOther
	if rt != nil {
		label = rt.handler
	}
	elapsed := time.Since(q.start)
	s.metrics.observe(label, code, elapsed)
	if conn != nil {
		conn.pay(label, a.err != nil, q.start.Add(elapsed))
	}
	if (a.err != nil || a.waited) && (label == handlerRoleList || label == handlerDocument) {
		s.logAnswer(q, a, code, elapsed)
	}
}

// answer takes the request through the checks, in the order of the package documentation.
func (q request) answer(rt *route) answer {
	s, r := q.s, q.r
	if !allowedHost(r.Host) {
		return q.refuse(nil, errHost)
	}
	if !known(r.Method) {
		return q.refuse(nil, errMethod)
	}
	if rt == nil {
		return q.refuse(nil, errPath)
	}
	if !allows(rt.allow, r.Method) {
		return q.refuse(nil, errMethod)
	}
	if rt.direct {
		if _, forwarded := r.Header["X-Forwarded-For"]; forwarded {
			return q.refuse(nil, errForwarded)
		}
	}
	if rt.token != nil {
		return rt.token(q)
	}
	issued, err := q.checkToken()
	if err != nil {
		return q.refuse(nil, err)
	}
	if rt.open != nil {
		return rt.open(q)
	}
	caller, held, err := q.identify()
	if err != nil {
		return q.refuse(nil, err)
	}
	q.held = held
	if issued.before(caller.Since, q.start) {
		return q.refuse(caller, q.tokenRefused(errToken))
	}
	if rt.pod != nil {
		return rt.pod(q, caller)
	}
	switch {
	case caller.Refusal != nil:
		if ev := caller.Refusal; ev.Event != "" {
			s.reports.Report(caller.Pod, ev.OnServiceAccount, ev.Event, ev.Error())
		}
		return q.refuse(caller, caller.Refusal)
	case caller.Grant == nil:
		return q.refuse(caller, errUndecided)
	}
	return rt.role(q, caller, caller.Grant)
}

// refuse counts and answers with an error.
func (q request) refuse(c *Caller, err error) answer {
	code, reason, text := status(err)
	q.remember(c, code, reason, text)
	if n := q.s.metrics.denied[reason]; n != nil {
		n.Inc()
	}
	if n := q.s.metrics.identifyFailures[reason]; n != nil {
		n.Inc()
	}
	return answer{err: err, caller: c}
}

// checkToken returns when the session token was issued; nothing when there is none and none is needed.
func (q request) checkToken() (issued, error) {
	values, present := q.r.Header[tokenHeader]
	if !present && q.s.imdsv1 {
		return issued{}, nil
	}
	if !present {
		return issued{}, q.tokenRefused(errNoToken)
	}
	if len(values) == 1 {
		last := &shown{}
		if q.conn != nil {
			last = &q.conn.shown
		}
		if i, ok := q.s.tokens.checkAgain(last, q.ip, values[0], q.start); ok {
			return i, nil
		}
	}
	return issued{}, q.tokenRefused(errToken)
}

// tokenRefused is err unless this source IP has had too many 401s: a client that ignores them and loops (aws-c-auth before
// the end of 2023: 10 000 a second) is cut off.
func (q request) tokenRefused(err error) error {
	if ok, _ := q.s.tokenRefusals.allow(q.ip, q.start); !ok {
		return errFlood
	}
	return err
}

func (q request) root() answer { return answer{text: "latest"} }

func (q request) token() answer {
	values := q.r.Header[tokenTTLHeader]
	if len(values) != 1 {
		return q.refuse(nil, errTTL)
	}
	ttl, ok := parseTTL(values[0])
	if !ok {
		return q.refuse(nil, errTTL)
	}
	return answer{text: q.s.tokens.issue(q.ip, q.start, ttl), ttl: strconv.Itoa(int(ttl / time.Second))}
}

// roleList answers 200 only when the document will: a failing document kills or hangs clients, a failing list does not.
func (q request) roleList(c *Caller, g *Grant) answer {
	_, waited, err := q.ready(g)
	if err != nil {
		return q.credentialsFailed(c, err)
	}
	return answer{text: g.Role, caller: c, waited: waited}
}

func (q request) document(c *Caller, g *Grant) answer {
	if !g.named(q.name) {
		return q.refuse(c, errOtherRole)
	}
	creds, waited, err := q.ready(g)
	if err != nil {
		return q.credentialsFailed(c, err)
	}
	if at := creds.Issued.UnixNano(); g.handedOut.Load() != at && g.handedOut.Swap(at) != at {
		q.s.logHandedOut(q, c, g, creds)
	}
	return answer{body: creds.Document(), caller: c, waited: waited}
}

func (q request) info(c *Caller, g *Grant) answer {
	return answer{body: instanceProfile(g.Key.RoleARN, q.start), caller: c}
}

// ready returns the credentials of g, which have a document, and whether the request had to wait for anything.
func (q request) ready(g *Grant) (creds *cache.Credentials, waited bool, err error) {
	if creds = q.s.credentials.Peek(&g.Key, &g.ref, q.start); creds == nil {
		ctx, cancel := q.context()
		defer cancel()
		if creds, err = q.s.credentials.Get(ctx, g.Key); err != nil {
			return nil, true, err
		}
		waited = true
	}
	if len(creds.Document()) == 0 {
		return nil, waited || q.held, cache.ErrUnavailable
	}
	return creds, waited || q.held, nil
}

// credentialsFailed reports what somebody can mend: STS's no, and what there is a hint for, such as an STS that cannot be
// reached. What passes by itself, such as throttling, is no Event.
func (q request) credentialsFailed(c *Caller, err error) answer {
	issue, _ := errors.AsType[*cache.IssueError](err)
	if _, _, text := status(err); issue != nil && (issue.Denied || issue.Hint != "") {
		q.s.reports.Report(c.Pod, false, EventCredentialsFailed, text)
	}
	return q.refuse(c, err)
}

// headerValues are ready values of headers; net/http does not write to them.
type headerValues struct {
	server, plain, close, retry, allowGet, allowPut []string
	lengths                                         [256]atomic.Pointer[length]
	dated                                           atomic.Pointer[date]
}

func newHeaderValues() *headerValues {
	return &headerValues{
		server: []string{"EC2ws"}, plain: []string{"text/plain"}, close: []string{"close"}, retry: []string{"1"},
		allowGet: []string{get}, allowPut: []string{put},
	}
}

// length is a number and what a header calls it.
type length struct {
	n     int
	value [1]string
}

// length makes a value once for each of the few lengths that answers have. All of them would be thousands of objects for every
// collection to look at.
func (v *headerValues) length(n int) []string {
	place := &v.lengths[n%len(v.lengths)]
	l := place.Load()
	if l == nil || l.n != n {
		l = &length{n, [1]string{strconv.Itoa(n)}}
		place.Store(l)
	}
	return l.value[:]
}

// date is a second and what a header calls it.
type date struct {
	unix  int64
	value [1]string
}

// date makes a value once a second. net/http asks the clock and formats for each answer that has no Date yet.
func (v *headerValues) date(now time.Time) []string {
	d := v.dated.Load()
	if d == nil || d.unix != now.Unix() {
		d = &date{now.Unix(), [1]string{now.UTC().Format(http.TimeFormat)}}
		v.dated.Store(d)
	}
	return d.value[:]
}

func (s *Server) write(w http.ResponseWriter, q request, rt *route, a answer) int {
	r := q.r
	code, reason := http.StatusOK, ""
	if a.err != nil {
		code, reason, a.text = status(a.err)
	}
	h := w.Header()
	h["Server"] = s.values.server
	h["Content-Type"] = s.values.plain
	h["Date"] = s.values.date(q.start)
	h["Content-Length"] = s.values.length(max(len(a.body), len(a.text)))
	switch code {
	case http.StatusOK:
		if a.ttl != "" {
			h[tokenTTLHeader] = []string{a.ttl}
		}
	case http.StatusMethodNotAllowed:
		h["Allow"] = s.values.allowGet
		if rt != nil && rt.allow == put {
			h["Allow"] = s.values.allowPut
		}
	case http.StatusServiceUnavailable:
		h["Retry-After"] = s.values.retry
	}
	// A body is never read, so what follows it on the connection cannot be found. What does not speak HTTP/1 cannot go on.
	if r.ContentLength != 0 || r.ProtoMajor != 1 || reason == reasonFlood || s.draining.Load() {
		h["Connection"] = s.values.close
	}
	if r.ContentLength != 0 { // net/http would wait for the rest of it for ever
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	}
	w.WriteHeader(code)
	if a.body != nil {
		_, _ = w.Write(a.body) // fails only when the client has left
	} else {
		_, _ = io.WriteString(w, a.text)
	}
	return code
}

// allowedHost refuses names that a page in a browser could have been made to resolve to the endpoint, and the real address
// of the port. HTTP/1.0 has no Host.
func allowedHost(host string) bool {
	switch host {
	case MetadataIPv4, MetadataIPv4 + ":80", "[" + MetadataIPv6 + "]", "[" + MetadataIPv6 + "]:80", "":
		return true
	}
	return false
}

// known methods get 404 for unknown paths; all others, whatever their path, 405.
func known(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPut, http.MethodPost, http.MethodDelete, http.MethodPatch:
		return true
	}
	return false
}

func allows(allow, method string) bool {
	return method == http.MethodPut == (allow == put) && (method == http.MethodPut || method == http.MethodGet || method == http.MethodHead)
}

// logCause is what log lines are counted by.
type logCause struct {
	ip     netip.Addr
	result string
}

// logHandedOut completes the cache's line about the session: an access key in CloudTrail leads to the pods that had it. It is
// written once for each session of a pod, and again when the role was decided anew.
func (s *Server) logHandedOut(q request, c *Caller, g *Grant, creds *cache.Credentials) {
	s.log.Info("session handed out", "namespace", c.Pod.Namespace, "pod", c.Pod.Name, "pod_uid", c.Pod.UID,
		"service_account", c.Pod.ServiceAccount, "source_ip", q.ip.String(), "role_arn", g.Key.RoleARN,
		"session_name", g.Key.SessionName, "access_key_id", creds.AccessKeyID, "expires", creds.Expires.UTC())
}

// logAnswer writes one line per credential answer that is not a hit. A pod that asks in a loop gets ten of a kind, then
// one a second that says how many were left out.
func (s *Server) logAnswer(q request, a answer, code int, elapsed time.Duration) {
	result, text := "wait", ""
	if a.err != nil {
		_, result, text = status(a.err)
	}
	ok, suppressed := s.logLines.allow(logCause{q.ip, result}, q.start)
	if !ok {
		return
	}
	attrs := make([]any, 0, 20)
	if c := a.caller; c != nil {
		attrs = append(attrs, "namespace", c.Pod.Namespace, "pod", c.Pod.Name, "service_account", c.Pod.ServiceAccount)
		if c.Grant != nil {
			attrs = append(attrs, "role_arn", c.Grant.Key.RoleARN)
		}
	} else {
		attrs = append(attrs, "source_ip", q.ip.String())
	}
	attrs = append(attrs, "result", result, "status", code, "duration", elapsed.Seconds())
	if text != "" {
		attrs = append(attrs, "error", text)
	}
	if suppressed > 0 {
		attrs = append(attrs, "suppressed", suppressed)
	}
	s.log.Info("credentials", attrs...)
}
