package sts

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awssts "github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/imdsgate/imdsgate/cache"
)

const (
	role   = "arn:aws:iam::123456789012:role/team/cart"
	hopARN = "arn:aws:iam::123456789012:role/hop"

	nodeSecret    = "NODE-SECRET-ACCESS-KEY"
	issuedSecret  = "ISSUED-SECRET-ACCESS-KEY"
	issuedSession = "ISSUED-SESSION-TOKEN"
	webToken      = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJodHRwczovL29pZGMuZXhhbXBsZS9pZC8xIiwic3ViIjoiYSJ9.c2lnbmF0dXJl"
)

var (
	key = cache.Key{
		RoleARN: role, SessionName: "shop.cart@node-1", Namespace: "shop", ServiceAccount: "cart", Duration: time.Hour,
	}
	webKey = cache.Key{
		RoleARN: role, SessionName: "shop.cart@node-1", Namespace: "shop", ServiceAccount: "cart", Duration: time.Hour,
		Audience: "sts.amazonaws.com",
	}
)

// environment makes the SDK's chain see nothing but what a test says.
func environment(t *testing.T, endpoint string) {
	t.Helper()
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	t.Setenv("AWS_CONFIG_FILE", os.DevNull)
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", os.DevNull)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_ENDPOINT_URL_STS", endpoint)
	t.Setenv("AWS_REGION", "eu-central-1")
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIANODE")
	t.Setenv("AWS_SECRET_ACCESS_KEY", nodeSecret)
}

// call is one request that the server saw.
type call struct {
	form          url.Values
	authorization string
	sessionToken  string
}

// signedBy is the access key that signed; empty: none did.
func (c call) signedBy() string {
	_, rest, _ := strings.Cut(c.authorization, "Credential=")
	id, _, _ := strings.Cut(rest, "/")
	return id
}

// answer is what a server sends back: by default, credentials.
type answer struct {
	status        int
	code, message string
	body          string        // instead of everything else
	expires       time.Duration // of the credentials
}

// server speaks STS's query protocol.
type server struct {
	mu      sync.Mutex
	calls   []call
	answers func(n int, c call) answer
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c := call{form: r.PostForm, authorization: r.Header.Get("Authorization"), sessionToken: r.Header.Get("X-Amz-Security-Token")}
	s.mu.Lock()
	s.calls = append(s.calls, c)
	n := len(s.calls)
	s.mu.Unlock()
	var a answer
	if s.answers != nil {
		a = s.answers(n, c)
	}
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("X-Amzn-Requestid", fmt.Sprintf("request-%d", n))
	if a.status == 0 {
		a.status = http.StatusOK
	}
	w.WriteHeader(a.status)
	switch {
	case a.body != "":
		fmt.Fprint(w, a.body)
	case a.code != "":
		fmt.Fprintf(w, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>%s</Code>`+
			`<Message>%s</Message></Error><RequestId>request-%d</RequestId></ErrorResponse>`, a.code, a.message, n)
	case c.form.Get("Action") == opGetCallerIdentity:
		fmt.Fprint(w, `<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>`+
			`<Arn>arn:aws:sts::123456789012:assumed-role/node/i-0</Arn></GetCallerIdentityResult></GetCallerIdentityResponse>`)
	default:
		if a.expires == 0 {
			a.expires = time.Hour
		}
		fmt.Fprintf(w, `<%[1]sResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><%[1]sResult><Credentials>`+
			`<AccessKeyId>ASIA%[2]d</AccessKeyId><SecretAccessKey>%[3]s</SecretAccessKey><SessionToken>%[4]s</SessionToken>`+
			`<Expiration>%[5]s</Expiration></Credentials></%[1]sResult></%[1]sResponse>`,
			c.form.Get("Action"), n, issuedSecret, issuedSession, time.Now().Add(a.expires).UTC().Format(time.RFC3339))
	}
}

func (s *server) seen() []call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// start returns an STS that asks a server which gives these answers.
func start(t *testing.T, o Options, answers func(n int, c call) answer) (*STS, *server) {
	t.Helper()
	srv := &server{answers: answers}
	h := httptest.NewServer(srv)
	t.Cleanup(h.Close)
	environment(t, h.URL)
	if o.WebIdentity && o.Tokens == nil {
		o.Tokens = tokenFunc(func(context.Context, string, string, string) (string, error) { return webToken, nil })
	}
	s, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return s, srv
}

type tokenFunc func(ctx context.Context, namespace, serviceAccount, audience string) (string, error)

func (f tokenFunc) Token(ctx context.Context, namespace, serviceAccount, audience string) (string, error) {
	return f(ctx, namespace, serviceAccount, audience)
}

func refuse(status int, code, message string) func(int, call) answer {
	return func(int, call) answer { return answer{status: status, code: code, message: message} }
}

// issueError is what Issue returns, which must be an *IssueError of one short line.
func issueError(t *testing.T, err error) *cache.IssueError {
	t.Helper()
	e, ok := errors.AsType[*cache.IssueError](err)
	if !ok {
		t.Fatalf("error is %T (%v), want *cache.IssueError", err, err)
	}
	if n := len(e.Err.Error()); n > maxText {
		t.Errorf("text is %d bytes, want at most %d", n, maxText)
	}
	if n := len(e.Error()); n > 1000 {
		t.Errorf("text with hint is %d bytes, want at most 1000", n)
	}
	if strings.ContainsFunc(e.Error(), func(r rune) bool { return r < ' ' || r == 0x7f }) {
		t.Errorf("text %q has control characters", e.Error())
	}
	return e
}

func TestRequestForm(t *testing.T) {
	plain := url.Values{
		"Action": {"AssumeRole"}, "Version": {"2011-06-15"}, "RoleArn": {role}, "RoleSessionName": {"shop.cart@node-1"},
		"DurationSeconds": {"3600"},
	}
	with := func(base url.Values, pairs ...string) url.Values {
		v := url.Values{}
		for k := range base {
			v[k] = base[k]
		}
		for i := 0; i < len(pairs); i += 2 {
			v[pairs[i]] = []string{pairs[i+1]}
		}
		return v
	}
	externalID, tagged, long, partial := key, key, key, key
	externalID.ExternalID = "id-1"
	tagged.Tags = cache.Tags{ClusterName: "prod", Namespace: "shop", ServiceAccount: "cart"}
	partial.Tags = cache.Tags{Namespace: "shop"}
	long.Duration = 12 * time.Hour
	minio := key
	minio.RoleARN = "arn:minio:iam:us-east-1::role/d2VsbA"
	for _, tt := range []struct {
		name string
		key  cache.Key
		want url.Values
	}{
		{"plain", key, plain},
		{"external ID", externalID, with(plain, "ExternalId", "id-1")},
		{"tags", tagged, with(plain,
			"Tags.member.1.Key", "eks-cluster-name", "Tags.member.1.Value", "prod",
			"Tags.member.2.Key", "kubernetes-namespace", "Tags.member.2.Value", "shop",
			"Tags.member.3.Key", "kubernetes-service-account", "Tags.member.3.Value", "cart")},
		{"no cluster name", partial, with(plain,
			"Tags.member.1.Key", "kubernetes-namespace", "Tags.member.1.Value", "shop")},
		{"duration", long, with(plain, "DurationSeconds", "43200")},
		{"another server's ARN", minio, with(plain, "RoleArn", minio.RoleARN)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, srv := start(t, Options{}, nil)
			before := time.Now()
			c, err := s.Issue(t.Context(), tt.key)
			if err != nil {
				t.Fatal(err)
			}
			calls := srv.seen()
			if len(calls) != 1 {
				t.Fatalf("%d calls, want 1", len(calls))
			}
			if diff := cmp.Diff(tt.want, calls[0].form); diff != "" {
				t.Errorf("form (-want +got):\n%s", diff)
			}
			if got := calls[0].signedBy(); got != "AKIANODE" {
				t.Errorf("signed by %q, want the node's key", got)
			}
			if !strings.Contains(calls[0].authorization, "/eu-central-1/sts/aws4_request") {
				t.Errorf("authorization %q is not for the region", calls[0].authorization)
			}
			if c.AccessKeyID != "ASIA1" || c.SecretAccessKey() != issuedSecret || c.SessionToken() != issuedSession || c.RequestID != "request-1" {
				t.Errorf("credentials %v, request %q", c, c.RequestID)
			}
			if c.Issued.Before(before) || c.Issued.After(time.Now()) {
				t.Errorf("issued %v, want now", c.Issued)
			}
			if left := time.Until(c.Expires); left < 58*time.Minute || left > time.Hour {
				t.Errorf("expires in %v, want the server's 1h", left)
			}
		})
	}
}

func TestWebIdentity(t *testing.T) {
	var asked [][3]string
	tokens := tokenFunc(func(_ context.Context, ns, sa, aud string) (string, error) {
		asked = append(asked, [3]string{ns, sa, aud})
		return fmt.Sprintf("%s%d", webToken, len(asked)), nil
	})
	s, srv := start(t, Options{WebIdentity: true, Tokens: tokens}, nil)
	for range 2 {
		if _, err := s.Issue(t.Context(), webKey); err != nil {
			t.Fatal(err)
		}
	}
	want := [3]string{"shop", "cart", "sts.amazonaws.com"}
	if diff := cmp.Diff([][3]string{want, want}, asked); diff != "" {
		t.Errorf("tokens asked for (-want +got):\n%s", diff)
	}
	for i, c := range srv.seen() {
		if diff := cmp.Diff(url.Values{
			"Action": {"AssumeRoleWithWebIdentity"}, "Version": {"2011-06-15"}, "RoleArn": {role}, "RoleSessionName": {"shop.cart@node-1"},
			"DurationSeconds": {"3600"}, "WebIdentityToken": {fmt.Sprintf("%s%d", webToken, i+1)},
		}, c.form); diff != "" {
			t.Errorf("form (-want +got):\n%s", diff)
		}
		if c.authorization != "" || c.sessionToken != "" {
			t.Errorf("the request is signed: %q", c.authorization)
		}
	}
}

func TestWebIdentityRefusesWhatItCannotSend(t *testing.T) {
	for name, change := range map[string]func(*cache.Key){
		"external ID": func(k *cache.Key) { k.ExternalID = "x" },
		"tags":        func(k *cache.Key) { k.Tags.Namespace = "shop" },
	} {
		s, srv := start(t, Options{WebIdentity: true}, nil)
		k := webKey
		change(&k)
		_, err := s.Issue(t.Context(), k)
		if e := issueError(t, err); !e.Denied || e.Hint == "" {
			t.Errorf("%s: %+v, want a refusal with a hint", name, e)
		}
		if n := len(srv.seen()); n != 0 {
			t.Errorf("%s: %d calls, want none", name, n)
		}
	}
}

func TestNoToken(t *testing.T) {
	gone := errors.New("pod is gone\nreally")
	for _, tt := range []struct {
		name   string
		err    error
		denied bool
		want   string
	}{
		{"plain", gone, false, "pod is gone really; fix: " + tokenHint},
		{"already told", &cache.IssueError{Denied: true, Err: gone}, true, ""},
	} {
		s, srv := start(t, Options{WebIdentity: true, Tokens: tokenFunc(func(context.Context, string, string, string) (string, error) {
			return "", tt.err
		})}, nil)
		_, err := s.Issue(t.Context(), webKey)
		var e *cache.IssueError
		if !errors.As(err, &e) || e.Denied != tt.denied || !errors.Is(err, gone) || tt.want != "" && e.Error() != tt.want {
			t.Errorf("%s: error %+v", tt.name, err)
		}
		if n := len(srv.seen()); n != 0 {
			t.Errorf("%s: %d calls, want none", tt.name, n)
		}
	}
}

func TestClassification(t *testing.T) {
	for _, tt := range []struct {
		status        int
		code, message string
		web           bool
		denied        bool
		label         string
	}{
		{403, "AccessDenied", "User: u is not authorized to perform: sts:AssumeRole on resource: r", false, true, "AccessDenied"},
		{403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity", true, true, "AccessDenied"},
		{400, "InvalidIdentityToken", "No OpenIDConnect provider found in your account for https://x", true, true, "InvalidIdentityToken"},
		{400, "InvalidIdentityToken", "Incorrect token audience", true, true, "InvalidIdentityToken"},
		{400, "InvalidIdentityToken", "Couldn't retrieve verification key from your identity provider", true, false, "InvalidIdentityToken"},
		{400, "ValidationError", "x is invalid", false, true, "ValidationError"},
		{400, "MalformedPolicyDocument", "x", false, true, "MalformedPolicyDocument"},
		{400, "PackedPolicyTooLarge", "x", false, true, "PackedPolicyTooLarge"},
		{403, "RegionDisabledException", "x", false, true, "RegionDisabledException"},
		{403, "IDPRejectedClaim", "x", true, true, "IDPRejectedClaim"},
		{400, "IDPCommunicationError", "x", true, false, "IDPCommunicationError"},
		{400, "ExpiredTokenException", "Token expired", true, false, "ExpiredTokenException"},
		{403, "ExpiredToken", "The security token included in the request is expired", false, false, "ExpiredToken"},
		{403, "InvalidClientTokenId", "x", false, false, "InvalidClientTokenId"},
		{403, "SignatureDoesNotMatch", "x", false, false, "SignatureDoesNotMatch"},
		{400, "Throttling", "Rate exceeded", false, false, "Throttling"},
		{400, "ThrottlingException", "Rate exceeded", true, false, "ThrottlingException"},
		{429, "SomethingNew", "x", false, false, "other"},
		{400, "SomethingNew", "x", false, true, "other"},
		{400, "InvalidParameterValue", "x", true, true, "other"},
		{500, "InternalFailure", "x", false, false, "InternalFailure"},
		{503, "ServiceUnavailable", "x", false, false, "ServiceUnavailable"},
		{503, "SomethingNew", "x", false, false, "other"},
	} {
		t.Run(tt.code+" "+tt.message, func(t *testing.T) {
			r := prometheus.NewPedanticRegistry()
			s, _ := start(t, Options{WebIdentity: tt.web, Metrics: r}, refuse(tt.status, tt.code, tt.message))
			k, op := key, opAssumeRole
			if tt.web {
				k, op = webKey, opWebIdentity
			}
			_, err := s.Issue(t.Context(), k)
			e := issueError(t, err)
			if e.Code != tt.code || e.Denied != tt.denied {
				t.Errorf("code %q, denied %v, want %q, %v", e.Code, e.Denied, tt.code, tt.denied)
			}
			if want := strings.HasPrefix(tt.code, "Throttling") || tt.status == 429; e.Throttled != want {
				t.Errorf("throttled %v, want %v", e.Throttled, want)
			}
			if want := op + " " + role + ": " + tt.code + ": " + tt.message; e.Err.Error() != want {
				t.Errorf("text %q, want %q", e.Err, want)
			}
			if got := testutil.ToFloat64(s.metrics.requests.WithLabelValues(op, tt.label)); got != 1 {
				t.Errorf("metric of %s is %v, want 1", tt.label, got)
			}
		})
	}
}

// A page of a proxy or a load balancer is not a refusal by STS.
func TestNotSTS(t *testing.T) {
	for _, tt := range []struct {
		status int
		body   string
	}{
		{403, "<html>blocked</html>"}, {403, "blocked"}, {200, "<html>login</html>"}, {404, "not found\n"}, {502, "bad gateway"},
	} {
		s, _ := start(t, Options{}, func(int, call) answer { return answer{status: tt.status, body: tt.body} })
		_, err := s.Issue(t.Context(), key)
		if e := issueError(t, err); e.Denied || e.Code != "" {
			t.Errorf("%d %q: %+v, want no refusal and no code", tt.status, tt.body, e)
		}
	}
}

func TestIncompleteAnswer(t *testing.T) {
	const all = "<AccessKeyId>a</AccessKeyId><SecretAccessKey>b</SecretAccessKey><SessionToken>c</SessionToken>" +
		"<Expiration>2031-01-02T15:04:05Z</Expiration>"
	for _, missing := range []string{
		"<AccessKeyId>a</AccessKeyId>", "<SecretAccessKey>b</SecretAccessKey>", "<SessionToken>c</SessionToken>",
		"<Expiration>2031-01-02T15:04:05Z</Expiration>", all,
	} {
		s, _ := start(t, Options{}, func(int, call) answer {
			return answer{body: "<AssumeRoleResponse><AssumeRoleResult><Credentials>" + strings.Replace(all, missing, "", 1) +
				"</Credentials></AssumeRoleResult></AssumeRoleResponse>"}
		})
		c, err := s.Issue(t.Context(), key)
		if e := issueError(t, err); e.Denied || !strings.Contains(e.Error(), "without complete credentials") {
			t.Errorf("without %q: error %+v", missing, e)
		}
		if c.AccessKeyID != "" {
			t.Errorf("without %q: credentials %v beside the error", missing, c)
		}
	}
}

// The issuer of a cluster that was made without one is no address that AWS could ask.
func TestHintInClusterIssuer(t *testing.T) {
	token := "e30." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"https://kubernetes.default.svc.cluster.local"}`)) + ".sig"
	tokens := tokenFunc(func(context.Context, string, string, string) (string, error) { return token, nil })
	s, _ := start(t, Options{WebIdentity: true, Tokens: tokens}, refuse(400, "InvalidIdentityToken", "No OpenIDConnect provider found in your account for https://kubernetes.default.svc.cluster.local"))
	_, err := s.Issue(t.Context(), webKey)
	if e := issueError(t, err); !strings.Contains(e.Hint, "--service-account-issuer") || strings.Contains(e.Hint, "create-open-id-connect-provider") {
		t.Errorf("hint %q", e.Hint)
	}
}

func TestHints(t *testing.T) {
	const nodeMessage = "User: arn:aws:sts::111122223333:assumed-role/node-role/i-0abc is not authorized to perform: sts:AssumeRole on resource: " + role
	tagged, external := key, key
	tagged.Tags.Namespace = "shop"
	external.ExternalID = "id-1"
	for _, tt := range []struct {
		name          string
		web           bool
		key           cache.Key
		status        int
		code, message string
		want          []string
	}{
		{"principal", false, key, 403, "AccessDenied", nodeMessage,
			[]string{`trust policy (with the path of the principal, if it has one): {"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::111122223333:role/node-role"},"Action":"sts:AssumeRole"}`}},
		{"tags", false, tagged, 403, "AccessDenied", strings.Replace(nodeMessage, "sts:AssumeRole", "sts:TagSession", 1),
			[]string{`"Action":["sts:AssumeRole","sts:TagSession"]`, ":role/node-role"}},
		{"external ID", false, external, 403, "AccessDenied", nodeMessage, []string{`"Condition":{"StringEquals":{"sts:ExternalId":"<the external ID of the annotation>"}}`}},
		{"user", false, key, 403, "AccessDenied", "User: arn:aws:iam::111122223333:user/u is not authorized", []string{`{"AWS":"arn:aws:iam::111122223333:user/u"}`}},
		{"denied by organization", false, key, 403, "AccessDenied", nodeMessage + " with an explicit deny in a service control policy",
			[]string{"find the statement with Effect Deny in the service control policy"}},
		{"denied by the role", false, key, 403, "AccessDenied", nodeMessage + " with an explicit deny in a resource-based policy", []string{"Effect Deny in the role's trust policy"}},
		{"boundary", false, key, 403, "AccessDenied", nodeMessage + " because no permissions boundary allows the sts:AssumeRole action",
			[]string{"the permissions boundary that applies to the node's role must allow it"}},
		{"node's policy", false, key, 403, "AccessDenied", nodeMessage + " because no identity-based policy allows the sts:AssumeRole action",
			[]string{`add to the policy of the node's role: {"Effect":"Allow","Action":"sts:AssumeRole","Resource":"` + role + `"}`}},
		{"trust policy", false, key, 403, "AccessDenied", nodeMessage + " because no resource-based policy allows the sts:AssumeRole action",
			[]string{`trust policy (with the path of the principal, if it has one): {"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::111122223333:role/node-role"}`}},
		{"no principal", false, key, 403, "AccessDenied", "Access denied", []string{`{"AWS":"<ARN of the node's role>"}`}},
		{"strange principal", false, key, 403, "AccessDenied", "User: %s&#10;oops is", []string{`{"AWS":"<ARN of the node's role>"}`}},
		{"subject", true, webKey, 403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity",
			[]string{`trust policy: {"Effect":"Allow","Principal":{"Federated":"arn:aws:iam::123456789012:oidc-provider/oidc.example/id/1"},"Action":"sts:AssumeRoleWithWebIdentity",` +
				`"Condition":{"StringEquals":{"oidc.example/id/1:aud":"sts.amazonaws.com","oidc.example/id/1:sub":"system:serviceaccount:shop:cart"}}}`}},
		{"web identity denied", true, webKey, 403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity with an explicit deny in a service control policy",
			[]string{"find the statement with Effect Deny in the service control policy"}},
		{"audience", true, webKey, 400, "InvalidIdentityToken", "Incorrect token audience", []string{`aws iam add-client-id-to-open-id-connect-provider --open-id-connect-provider-arn arn:aws:iam::123456789012:oidc-provider/oidc.example/id/1 --client-id sts.amazonaws.com`}},
		{"issuer", true, webKey, 400, "InvalidIdentityToken", "No OpenIDConnect provider found in your account for https://x",
			[]string{"create an IAM OIDC provider", "in account 123456789012", "aws iam create-open-id-connect-provider --url https://oidc.example/id/1 --client-id-list sts.amazonaws.com"}},
		{"strange token", true, webKey, 400, "InvalidIdentityToken", "The ID Token provided is not a valid JWT", nil},
		{"chaining", false, key, 400, "ValidationError", "exceeds the 1 hour session limit for roles assumed by role chaining", []string{"to 1h"}},
		{"maximum", false, key, 400, "ValidationError", "exceeds the MaxSessionDuration set for this role", []string{"raise the role's MaxSessionDuration"}},
		{"ARN", false, key, 400, "ValidationError", "Value 'x' at 'roleArn' failed", []string{"correct the role's ARN"}},
		{"region", true, webKey, 403, "RegionDisabledException", "STS is not activated", []string{"activate this region's STS endpoint"}},
		{"packed", false, tagged, 400, "PackedPolicyTooLarge", "Serialized token too large", []string{"-session-tags"}},
		{"node", false, key, 403, "InvalidClientTokenId", "The security token is invalid", []string{"node's own credentials"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := start(t, Options{WebIdentity: tt.web}, refuse(tt.status, tt.code, tt.message))
			_, err := s.Issue(t.Context(), tt.key)
			e := issueError(t, err)
			if tt.want == nil && e.Hint != "" {
				t.Errorf("hint %q, want none", e.Hint)
			}
			for _, want := range tt.want {
				if !strings.Contains(e.Hint, want) {
					t.Errorf("hint %q, want %q in it", e.Hint, want)
				}
			}
			if !strings.HasSuffix(err.Error(), e.Hint) {
				t.Errorf("text %q ends without the hint", err)
			}
		})
	}
}

func TestLongTexts(t *testing.T) {
	long := key
	long.RoleARN = "arn:aws:iam::123456789012:role/" + strings.Repeat("é", 2000)
	s, _ := start(t, Options{}, refuse(403, "AccessDenied", "not allowed. Encoded authorization failure message: "+strings.Repeat("QUJD", 4000)))
	_, err := s.Issue(t.Context(), long)
	if e := issueError(t, err); strings.Contains(e.Error(), "QUJD") {
		t.Errorf("text %q holds the encoded message", e)
	}
	s, _ = start(t, Options{}, refuse(403, strings.Repeat("A", 3000), strings.Repeat("b&#10;", 4000)))
	_, err = s.Issue(t.Context(), key)
	if e := issueError(t, err); len(e.Code) > 64 {
		t.Errorf("code is %d bytes", len(e.Code))
	}
}

func TestDurationFallback(t *testing.T) {
	for name, message := range map[string]string{
		"maximum":  "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.",
		"chaining": "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining",
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			s, srv := start(t, Options{Log: slog.New(slog.NewJSONHandler(&log, nil))}, func(_ int, c call) answer {
				if c.form.Get("DurationSeconds") != "3600" {
					return answer{status: 400, code: "ValidationError", message: message}
				}
				return answer{}
			})
			long := key
			long.Duration = 4 * time.Hour
			for range 2 {
				if _, err := s.Issue(t.Context(), long); err != nil {
					t.Fatal(err)
				}
			}
			if n := len(srv.seen()); n != 4 {
				t.Errorf("%d calls, want 2 for each issue", n)
			}
			if n := strings.Count(log.String(), role+`","session_duration":"4h0m0s"`); n != 1 {
				t.Errorf("said %d times, want once:\n%s", n, &log)
			}
		})
	}
	t.Run("only once", func(t *testing.T) {
		s, srv := start(t, Options{}, refuse(400, "ValidationError", "DurationSeconds exceeds the MaxSessionDuration set for this role"))
		long := key
		long.Duration = 2 * time.Hour
		_, err := s.Issue(t.Context(), long)
		if e := issueError(t, err); !e.Denied || len(srv.seen()) != 2 {
			t.Errorf("%d calls and %+v, want 2 and a refusal", len(srv.seen()), e)
		}
		_, err = s.Issue(t.Context(), key) // 1 h: nothing shorter to ask for
		if e := issueError(t, err); !e.Denied || len(srv.seen()) != 3 {
			t.Errorf("%d calls and %+v, want 3 and a refusal", len(srv.seen()), e)
		}
	})
	t.Run("other refusals", func(t *testing.T) {
		s, srv := start(t, Options{}, refuse(400, "ValidationError", "RoleArn is invalid"))
		long := key
		long.Duration = 2 * time.Hour
		if _, err := s.Issue(t.Context(), long); err == nil || len(srv.seen()) != 1 {
			t.Errorf("%d calls, error %v, want 1 and an error", len(srv.seen()), err)
		}
	})
}

// The SDK's second attempt is the only retry.
func TestAttempts(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answers func(int, call) answer
		calls   int
		ok      bool
	}{
		{"one failure", func(n int, _ call) answer {
			if n == 1 {
				return answer{status: 503, code: "ServiceUnavailable"}
			}
			return answer{}
		}, 2, true},
		{"down", refuse(500, "InternalFailure", ""), 2, false},
		{"throttled", refuse(400, "Throttling", "Rate exceeded"), 2, false},
		{"refused", refuse(403, "AccessDenied", ""), 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, srv := start(t, Options{}, tt.answers)
			_, err := s.Issue(t.Context(), key)
			if (err == nil) != tt.ok || len(srv.seen()) != tt.calls {
				t.Errorf("%d calls and error %v, want %d calls", len(srv.seen()), err, tt.calls)
			}
		})
	}
}

// A server that takes connections and says nothing costs less than the 10 s that the cache allows, however often it happens.
func TestTimeout(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	s, _ := start(t, Options{Metrics: r}, nil)
	synctest.Test(t, func(t *testing.T) {
		s.client = awssts.New(s.client.Options(), func(o *awssts.Options) {
			o.HTTPClient = o.HTTPClient.(bounded).HTTPClient.(*awshttp.BuildableClient).WithTransportOptions(func(tr *http.Transport) {
				tr.DialContext = func(context.Context, string, string) (net.Conn, error) {
					ours, theirs := net.Pipe()
					t.Cleanup(func() { theirs.Close() })
					return ours, nil
				}
			})
		})
		begin := time.Now()
		_, err := s.Issue(t.Context(), key)
		took := time.Since(begin)
		if e := issueError(t, err); e.Denied || e.Code != "" || !strings.Contains(e.Error(), "did not answer in time") {
			t.Errorf("error %+v", e)
		}
		if took < attempts*attemptTimeout || took > 9500*time.Millisecond {
			t.Errorf("took %v, want both attempts and less than 9.5s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = s.Issue(ctx, key)
		if e := issueError(t, err); e.Denied || !strings.Contains(e.Error(), "did not answer in time") {
			t.Errorf("error %+v", e)
		}
	})
	if got := testutil.ToFloat64(s.metrics.requests.WithLabelValues(opAssumeRole, codeTimeout)); got != 2 {
		t.Errorf("metric of timeouts is %v, want 2", got)
	}
}

func TestUnreachable(t *testing.T) {
	s, _ := start(t, Options{}, nil)
	endpoint := "http://127.0.0.1:1" // a port that nobody is given meanwhile
	s.client = awssts.New(s.client.Options(), func(o *awssts.Options) { o.BaseEndpoint = &endpoint })
	_, err := s.Issue(t.Context(), key)
	if e := issueError(t, err); e.Denied || e.Code != "" || !strings.Contains(e.Error(), "STS cannot be reached at "+endpoint) {
		t.Errorf("error %+v", e)
	}
	if got := testutil.ToFloat64(s.metrics.requests.WithLabelValues(opAssumeRole, codeUnreachable)); got != 1 {
		t.Errorf("metric is %v, want 1", got)
	}
}

func TestNodeWithoutCredentials(t *testing.T) {
	_, srv := start(t, Options{}, nil)
	os.Unsetenv("AWS_ACCESS_KEY_ID")
	s, err := New(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Issue(t.Context(), key)
	if e := issueError(t, err); e.Denied || e.Code != "" || !strings.Contains(e.Hint, "instance profile") {
		t.Errorf("error %+v", e)
	}
	if err := s.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "instance profile") {
		t.Errorf("check: %v", err)
	}
	if n := len(srv.seen()); n != 0 {
		t.Errorf("%d calls, want none", n)
	}
}

func TestNoSecretInLogsOrErrors(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var shown []string
	show := func(err error) {
		e := issueError(t, err)
		shown = append(shown, fmt.Sprintf("%v|%+v|%#v|%s", e, e, e, err))
		logger.Error("x", "error", err)
	}
	echo := func(n int, c call) answer { // the rudest of servers
		return answer{status: 400, code: "InvalidIdentityToken", message: "bad token: " + c.form.Get("WebIdentityToken") + " " + c.form.Get("WebIdentityToken")}
	}
	s, _ := start(t, Options{WebIdentity: true, Log: logger}, echo)
	_, err := s.Issue(t.Context(), webKey)
	show(err)
	s, _ = start(t, Options{Log: logger}, nil)
	c, err := s.Issue(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	logger.Info("issued", "credentials", c)
	shown = append(shown, fmt.Sprintf("%v %+v %#v", c, c, c))
	s, _ = start(t, Options{Log: logger, IntermediateRoleARN: hopARN}, func(n int, _ call) answer {
		if n == 1 {
			return answer{}
		}
		return answer{status: 400, code: "ValidationError", message: "role chaining"}
	})
	long := key
	long.Duration = 2 * time.Hour
	_, err = s.Issue(t.Context(), long)
	show(err)
	shown = append(shown, fmt.Sprintf("%v %+v", s.intermediate.log, s.metrics.requests), log.String())
	if !strings.Contains(log.String(), "InvalidIdentityToken") || !strings.Contains(log.String(), hopARN) && !strings.Contains(log.String(), role) {
		t.Fatalf("nothing was logged:\n%s", &log)
	}
	for _, text := range shown {
		for _, secret := range []string{webToken, nodeSecret, issuedSecret, issuedSession} {
			if strings.Contains(text, secret) {
				t.Errorf("%q holds %q", text, secret)
			}
		}
	}
}

func TestMetrics(t *testing.T) {
	r := prometheus.NewPedanticRegistry()
	s, _ := start(t, Options{Metrics: r}, func(n int, _ call) answer {
		switch n {
		case 1:
			return answer{}
		case 2:
			return answer{status: 403, code: "AccessDenied"}
		}
		return answer{status: 400, code: fmt.Sprintf("MadeUp%d", n)}
	})
	for range 6 {
		s.Issue(t.Context(), key)
	}
	if err := s.Check(t.Context()); err == nil {
		t.Error("check passes")
	}
	if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP imdsgate_sts_requests_total Calls of STS by operation and result: OK, STS's error code, timeout, unreachable or other.
# TYPE imdsgate_sts_requests_total counter
imdsgate_sts_requests_total{code="AccessDenied",operation="AssumeRole"} 1
imdsgate_sts_requests_total{code="OK",operation="AssumeRole"} 1
imdsgate_sts_requests_total{code="other",operation="AssumeRole"} 4
imdsgate_sts_requests_total{code="other",operation="GetCallerIdentity"} 1
`), "imdsgate_sts_requests_total"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(r, "imdsgate_sts_request_duration_seconds"); n != 2 || err != nil {
		t.Errorf("%d histograms (%v), want one for each operation", n, err)
	}
	if problems, err := testutil.GatherAndLint(r); len(problems) != 0 || err != nil {
		t.Errorf("lint: %v %v", problems, err)
	}
	if _, err := New(t.Context(), Options{Metrics: r}); err == nil {
		t.Error("a second registration passes")
	}
}

func TestNewRefusesOptions(t *testing.T) {
	environment(t, "http://127.0.0.1:1")
	for name, o := range map[string]Options{
		"no tokens":    {WebIdentity: true},
		"intermediate": {WebIdentity: true, Tokens: tokenFunc(nil), IntermediateRoleARN: hopARN},
	} {
		if _, err := New(t.Context(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	bad := filepath.Join(t.TempDir(), "bundle")
	if err := os.WriteFile(bad, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_CA_BUNDLE", bad)
	if _, err := New(t.Context(), Options{}); err == nil {
		t.Error("a broken AWS_CA_BUNDLE passes")
	}
}

func TestCheck(t *testing.T) {
	down := refuse(503, "ServiceUnavailable", "x")
	for _, tt := range []struct {
		name    string
		o       Options
		answers func(int, call) answer
		want    string // in the error; empty: none
		actions []string
	}{
		{"fine", Options{}, nil, "", []string{opGetCallerIdentity}},
		{"refused", Options{}, refuse(403, "InvalidClientTokenId", "The security token is invalid"), "node's own credentials", []string{opGetCallerIdentity}},
		{"intermediate", Options{IntermediateRoleARN: hopARN}, nil, "", []string{opAssumeRole, opGetCallerIdentity}},
		{"intermediate refused", Options{IntermediateRoleARN: hopARN}, refuse(403, "AccessDenied", ""), "intermediate role: AssumeRole " + hopARN, []string{opAssumeRole}},
		{"web identity", Options{WebIdentity: true}, refuse(400, "InvalidIdentityToken", ""), "", []string{opWebIdentity}},
		{"web identity down", Options{WebIdentity: true}, down, "ServiceUnavailable", []string{opWebIdentity, opWebIdentity}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, srv := start(t, tt.o, tt.answers)
			err := s.Check(t.Context())
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			var actions []string
			for _, c := range srv.seen() {
				actions = append(actions, c.form.Get("Action"))
			}
			if diff := cmp.Diff(tt.actions, actions); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
		})
	}
}

// Refused credentials of the node are fetched anew by the SDK's own cache.
func TestNodeCredentialsFetchedAgainWhenRefused(t *testing.T) {
	srv := &server{answers: func(n int, _ call) answer {
		if n == 1 {
			return answer{status: 403, code: "ExpiredToken", message: "expired"}
		}
		return answer{}
	}}
	h := httptest.NewServer(srv)
	t.Cleanup(h.Close)
	environment(t, h.URL)
	os.Unsetenv("AWS_ACCESS_KEY_ID")
	os.Unsetenv("AWS_SECRET_ACCESS_KEY")
	n := filepath.Join(t.TempDir(), "n")
	config := filepath.Join(t.TempDir(), "config")
	process := fmt.Sprintf("/bin/sh -c 'echo x >>%s; printf \"{\\\"Version\\\":1,\\\"AccessKeyId\\\":\\\"AKIA%%d\\\",\\\"SecretAccessKey\\\":\\\"s\\\"}\" $(wc -l <%s)'", n, n)
	if err := os.WriteFile(config, []byte("[default]\ncredential_process = "+process+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_CONFIG_FILE", config)
	s, err := New(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Issue(t.Context(), key)
	if e := issueError(t, err); e.Denied || e.Code != "ExpiredToken" {
		t.Errorf("first: %+v", e)
	}
	for range 2 {
		if _, err := s.Issue(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	var signers []string
	for _, c := range srv.seen() {
		signers = append(signers, c.signedBy())
	}
	if diff := cmp.Diff([]string{"AKIA1", "AKIA2", "AKIA2"}, signers); diff != "" {
		t.Errorf("signers (-want +got):\n%s", diff)
	}
}
