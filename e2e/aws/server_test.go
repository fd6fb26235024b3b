package aws

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/iam"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

const (
	region  = "eu-central-1"
	account = "111122223333"
	node    = "arn:aws:iam::111122223333:role/node"
	cart    = "arn:aws:iam::111122223333:role/team/cart"
	user    = "arn:aws:iam::111122223333:user/alice"
)

func role(name string) string { return "arn:aws:iam::111122223333:role/" + name }

// roles of the tests. Each has one peculiarity, told by its name.
var roles = []Role{
	{ARN: node, Allow: []string{"sts:* arn:aws:iam::111122223333:role/root", "sts:AssumeRole arn:aws:iam::444455556666:role/foreign"}},
	{ARN: cart, Trust: []Trust{{AWS: node}}, Allow: []string{ActionListBuckets, "iam:*"}},
	{ARN: role("powerless"), Trust: []Trust{{AWS: node}}, Allow: []string{"s3:GetObject"}},
	{ARN: role("long"), Trust: []Trust{{AWS: user}, {AWS: node}}, MaxSessionDuration: 4 * time.Hour},
	{ARN: role("external"), Trust: []Trust{{AWS: node, ExternalID: "id-1"}}},
	{ARN: role("tagged"), Trust: []Trust{{
		AWS: node, Actions: []string{ActionAssumeRole, ActionTagSession},
		RequestTags: map[string]string{"kubernetes-namespace": "shop*"}, TagKeys: []string{"kubernetes-namespace", "eks-cluster-name"},
	}}},
	{ARN: role("hop"), Trust: []Trust{{AWS: node}}},
	{ARN: role("behind-hop"), Trust: []Trust{{AWS: role("hop")}}, MaxSessionDuration: 12 * time.Hour},
	{ARN: role("root"), Trust: []Trust{{AWS: "arn:aws:iam::111122223333:root"}}},
	{ARN: role("root-unallowed"), Trust: []Trust{{AWS: "arn:aws:iam::111122223333:root"}}},
	{ARN: "arn:aws:iam::444455556666:role/foreign", Trust: []Trust{{AWS: node}}},
	{ARN: "arn:aws:iam::444455556666:role/foreign-unallowed", Trust: []Trust{{AWS: node}}},
	{ARN: role("trusts-a-session"), Trust: []Trust{{AWS: "arn:aws:sts::111122223333:assumed-role/hop/me"}}},
	{ARN: role("trusts-nobody")},
	{ARN: role("web"), Trust: []Trust{{
		Federated: Provider{Account: account, Issuer: issuer}.ARN(), Subject: "system:serviceaccount:shop:cart", Audience: "sts.amazonaws.com",
	}}, MaxSessionDuration: 2 * time.Hour, Allow: []string{ActionListBuckets}},
}

// lab is a server behind an endpoint on loopback, with a clock that can be moved.
type lab struct {
	*Server
	url   string
	shift atomic.Int64 // of the server's clock, in nanoseconds
}

func start(t *testing.T) *lab {
	t.Helper()
	l := new(lab)
	s, err := New(Options{
		Region: region, Roles: roles, NodeRoleARN: node, Buckets: []string{"carts", "orders"}, Groups: []string{"admins"},
		Now: func() time.Time { return time.Now().Add(time.Duration(l.shift.Load())) },
	})
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	l.Server, l.url = s, h.URL
	return l
}

func (l *lab) node(t *testing.T) awssdk.Credentials {
	t.Helper()
	c, err := l.NodeCredentials()
	if err != nil {
		t.Fatal(err)
	}
	return c.SDK()
}

// config is that of an SDK client with these credentials. Nothing of the environment is in it.
func (l *lab) config(c awssdk.Credentials) awssdk.Config {
	return awssdk.Config{
		Region: region, BaseEndpoint: &l.url, HTTPClient: new(http.Client),
		Retryer: func() awssdk.Retryer { return awssdk.NopRetryer{} },
		Credentials: awssdk.CredentialsProviderFunc(func(context.Context) (awssdk.Credentials, error) {
			return c, nil
		}),
	}
}

// assume calls AssumeRole and returns the new session's credentials.
func (l *lab) assume(ctx context.Context, c awssdk.Credentials, in *sts.AssumeRoleInput) (awssdk.Credentials, error) {
	if in.RoleSessionName == nil {
		in.RoleSessionName = awssdk.String("me")
	}
	out, err := sts.NewFromConfig(l.config(c)).AssumeRole(ctx, in)
	if err != nil {
		return awssdk.Credentials{}, err
	}
	return awssdk.Credentials{
		AccessKeyID: *out.Credentials.AccessKeyId, SecretAccessKey: *out.Credentials.SecretAccessKey, SessionToken: *out.Credentials.SessionToken,
		CanExpire: true, Expires: *out.Credentials.Expiration,
	}, nil
}

func (l *lab) mustAssume(t *testing.T, c awssdk.Credentials, roleARN string) awssdk.Credentials {
	t.Helper()
	c, err := l.assume(t.Context(), c, &sts.AssumeRoleInput{RoleArn: &roleARN})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (l *lab) whoami(ctx context.Context, c awssdk.Credentials) (string, error) {
	out, err := sts.NewFromConfig(l.config(c)).GetCallerIdentity(ctx, nil)
	if err != nil {
		return "", err
	}
	return *out.Arn, nil
}

// outcome is what an SDK makes of an answer: OK, or the status and code of a refusal.
func outcome(err error) string {
	if err == nil {
		return OK
	}
	var api smithy.APIError
	var res *smithyhttp.ResponseError
	if !errors.As(err, &api) || !errors.As(err, &res) {
		return err.Error()
	}
	return fmt.Sprintf("%d %s", res.HTTPStatusCode(), api.ErrorCode())
}

// expect compares the outcome, and the message when it is given.
func expect(t *testing.T, err error, want, message string) {
	t.Helper()
	if got := outcome(err); got != want {
		t.Errorf("%s, want %s (%v)", got, want, err)
	}
	var api smithy.APIError
	if errors.As(err, &api) && !strings.Contains(api.ErrorMessage(), message) {
		t.Errorf("message %q, want %q in it", api.ErrorMessage(), message)
	}
}

func TestAssumeRole(t *testing.T) {
	seconds := func(n int32) *int32 { return &n }
	tag := func(pairs ...string) (tags []types.Tag) {
		for i := 0; i < len(pairs); i += 2 {
			tags = append(tags, types.Tag{Key: &pairs[i], Value: &pairs[i+1]})
		}
		return tags
	}
	const denied, invalid = "403 AccessDenied", "400 ValidationError"
	for _, tt := range []struct {
		name    string
		as      string // node, user, or a role that the node assumes first
		role    string
		in      sts.AssumeRoleInput
		want    string
		message string
	}{
		{name: "trusted by name", as: "node", role: cart, want: OK},
		{name: "not trusted", as: "node", role: role("trusts-nobody"), want: denied,
			message: "User: arn:aws:sts::111122223333:assumed-role/node/i-0123456789abcdef0 is not authorized to perform: sts:AssumeRole on resource: arn:aws:iam::111122223333:role/trusts-nobody"},
		{name: "no such role", as: "node", role: role("unknown"), want: denied},
		{name: "another caller", as: cart, role: role("external"), want: denied},
		{name: "user who is not trusted", as: "user", role: cart, want: denied},
		{name: "path left out", as: "node", role: role("cart"), want: denied},
		{name: "account trusted, own policy allows", as: "node", role: role("root"), want: OK},
		{name: "account trusted, own policy silent", as: "node", role: role("root-unallowed"), want: denied},
		{name: "other account, own policy allows", as: "node", role: "arn:aws:iam::444455556666:role/foreign", want: OK},
		{name: "other account, own policy silent", as: "node", role: "arn:aws:iam::444455556666:role/foreign-unallowed", want: denied},

		{name: "external ID", as: "node", role: role("external"), in: sts.AssumeRoleInput{ExternalId: awssdk.String("id-1")}, want: OK},
		{name: "no external ID", as: "node", role: role("external"), want: denied},
		{name: "wrong external ID", as: "node", role: role("external"), in: sts.AssumeRoleInput{ExternalId: awssdk.String("id-2")}, want: denied},
		{name: "external ID nobody asked for", as: "node", role: cart, in: sts.AssumeRoleInput{ExternalId: awssdk.String("id-1")}, want: OK},
		{name: "odd external ID", as: "node", role: cart, in: sts.AssumeRoleInput{ExternalId: awssdk.String("a b")}, want: invalid, message: "externalId"},

		{name: "tags", as: "node", role: role("tagged"), in: sts.AssumeRoleInput{Tags: tag("kubernetes-namespace", "shop", "eks-cluster-name", "prod")}, want: OK},
		{name: "required tag missing", as: "node", role: role("tagged"), want: denied},
		{name: "required tag differs", as: "node", role: role("tagged"), in: sts.AssumeRoleInput{Tags: tag("kubernetes-namespace", "kube-system")}, want: denied},
		{name: "tag that is not allowed", as: "node", role: role("tagged"), in: sts.AssumeRoleInput{Tags: tag("kubernetes-namespace", "shop", "admin", "yes")}, want: denied},
		{name: "tags without TagSession", as: "node", role: cart, in: sts.AssumeRoleInput{Tags: tag("a", "b")}, want: denied,
			message: "is not authorized to perform: sts:TagSession on resource"},
		{name: "tag twice", as: "node", role: role("tagged"), in: sts.AssumeRoleInput{Tags: tag("a", "b", "A", "c")}, want: "400 InvalidParameterValue"},
		{name: "odd tag", as: "node", role: role("tagged"), in: sts.AssumeRoleInput{Tags: tag("kubernetes-namespace", "shop;")}, want: invalid, message: "tags.1.member"},
		{name: "long tag", as: "node", role: role("tagged"), in: sts.AssumeRoleInput{Tags: tag("kubernetes-namespace", strings.Repeat("s", 257))}, want: invalid, message: "tags.1.member.value"},

		{name: "shortest", as: "node", role: cart, in: sts.AssumeRoleInput{DurationSeconds: seconds(900)}, want: OK},
		{name: "too short", as: "node", role: cart, in: sts.AssumeRoleInput{DurationSeconds: seconds(899)}, want: invalid, message: "greater than or equal to 900"},
		{name: "too long for any role", as: "user", role: role("long"), in: sts.AssumeRoleInput{DurationSeconds: seconds(43201)}, want: invalid, message: "less than or equal to 43200"},
		{name: "maximum of the role", as: "user", role: role("long"), in: sts.AssumeRoleInput{DurationSeconds: seconds(4 * 3600)}, want: OK},
		{name: "beyond the maximum of the role", as: "user", role: role("long"), in: sts.AssumeRoleInput{DurationSeconds: seconds(4*3600 + 1)}, want: invalid,
			message: "The requested DurationSeconds exceeds the MaxSessionDuration set for this role."},
		{name: "role chaining within 1h", as: role("hop"), role: role("behind-hop"), in: sts.AssumeRoleInput{DurationSeconds: seconds(3600)}, want: OK},
		{name: "role chaining beyond 1h", as: role("hop"), role: role("behind-hop"), in: sts.AssumeRoleInput{DurationSeconds: seconds(3601)}, want: invalid,
			message: "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining"},
		{name: "the node's session chains too", as: "node", role: role("long"), in: sts.AssumeRoleInput{DurationSeconds: seconds(3601)}, want: invalid,
			message: "role chaining"},
		{name: "past the hop", as: "node", role: role("behind-hop"), want: denied},
		{name: "a session trusted by its name", as: role("hop"), role: role("trusts-a-session"), want: OK},

		{name: "session name", as: "node", role: cart, in: sts.AssumeRoleInput{RoleSessionName: awssdk.String("shop.cart@node-1")}, want: OK},
		{name: "odd session name", as: "node", role: cart, in: sts.AssumeRoleInput{RoleSessionName: awssdk.String("shop/cart")}, want: invalid, message: "roleSessionName"},
		{name: "short session name", as: "node", role: cart, in: sts.AssumeRoleInput{RoleSessionName: awssdk.String("x")}, want: invalid, message: "roleSessionName"},
		{name: "long session name", as: "node", role: cart, in: sts.AssumeRoleInput{RoleSessionName: awssdk.String(strings.Repeat("x", 65))}, want: invalid, message: "roleSessionName"},
		{name: "no ARN", as: "node", role: "just-a-name-of-a-role", want: invalid, message: "just-a-name-of-a-role is invalid"},
		{name: "short ARN", as: "node", role: "arn:oops", want: invalid, message: "roleArn"},
		{name: "ARN of a user", as: "node", role: user, want: invalid, message: "is invalid"},
		{name: "ARN with wildcard", as: "node", role: role("*"), want: invalid, message: "is invalid"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := start(t)
			var c awssdk.Credentials
			switch tt.as {
			case "node":
				c = l.node(t)
			case "user":
				alice, err := l.UserCredentials(user)
				if err != nil {
					t.Fatal(err)
				}
				c = alice.SDK()
			default:
				c = l.mustAssume(t, l.node(t), tt.as)
			}
			in := tt.in
			in.RoleArn = &tt.role
			begin := time.Now()
			issued, err := l.assume(t.Context(), c, &in)
			expect(t, err, tt.want, tt.message)
			if err != nil {
				return
			}
			want := time.Hour
			if in.DurationSeconds != nil {
				want = time.Duration(*in.DurationSeconds) * time.Second
			}
			if got := issued.Expires.Sub(begin); got > want+time.Second || got < want-2*time.Second {
				t.Errorf("expires in %v, want %v", got, want)
			}
			arn, err := l.whoami(t.Context(), issued)
			if err != nil {
				t.Fatal(err)
			}
			if want := (Role{ARN: tt.role}).sessionARN(*in.RoleSessionName); arn != want {
				t.Errorf("identity %s, want %s", arn, want)
			}
		})
	}
}

func TestServicesObeyTheRolesPolicy(t *testing.T) {
	l := start(t)
	n := l.node(t)
	for _, tt := range []struct {
		name string
		c    awssdk.Credentials
		want string
	}{
		{"allowed", l.mustAssume(t, n, cart), OK},
		{"not allowed", l.mustAssume(t, n, role("powerless")), "403 AccessDenied"},
		{"node", n, "403 AccessDenied"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			buckets, err := s3.NewFromConfig(l.config(tt.c), func(o *s3.Options) { o.UsePathStyle = true }).ListBuckets(t.Context(), nil)
			if got := outcome(err); got != tt.want {
				t.Errorf("ListBuckets: %s, want %s (%v)", got, tt.want, err)
			}
			if err == nil && (len(buckets.Buckets) != 2 || *buckets.Buckets[0].Name != "carts" || buckets.Buckets[0].CreationDate == nil) {
				t.Errorf("buckets %+v", buckets.Buckets)
			}
			groups, err := iam.NewFromConfig(l.config(tt.c)).ListGroups(t.Context(), nil)
			if got := outcome(err); got != tt.want {
				t.Errorf("ListGroups: %s, want %s (%v)", got, tt.want, err)
			}
			if err == nil && (len(groups.Groups) != 1 || *groups.Groups[0].GroupName != "admins" || groups.IsTruncated) {
				t.Errorf("groups %+v", groups.Groups)
			}
		})
	}
	c := l.mustAssume(t, n, cart)
	if err := l.SetRole(Role{ARN: cart, Trust: []Trust{{AWS: node}}}); err != nil { // its policy is taken away
		t.Fatal(err)
	}
	_, err := iam.NewFromConfig(l.config(c)).ListGroups(t.Context(), nil)
	expect(t, err, "403 AccessDenied", "no identity-based policy allows the iam:ListGroups action")
	l.DeleteRole(cart)
	_, err = l.assume(t.Context(), n, &sts.AssumeRoleInput{RoleArn: awssdk.String(cart)})
	expect(t, err, "403 AccessDenied", "")
}

// signed is a request that the test signs by itself, so that it can sign it wrongly.
type signed struct {
	method, body    string
	service, region string
	at              time.Time
	credentials     awssdk.Credentials
	header          http.Header
	after           func(*http.Request) // changes what is sent, once it is signed
	noToken         bool                // the session token is neither signed nor sent
	unsignedToken   bool                // it is sent, but not signed
}

func (l *lab) send(t *testing.T, q signed) (status int, code, message string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), q.method, l.url+"/", strings.NewReader(q.body))
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(r.Header, q.header)
	if q.method == http.MethodPost {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	sum := sha256.Sum256([]byte(q.body))
	token := q.credentials.SessionToken
	if q.noToken || q.unsignedToken {
		q.credentials.SessionToken = ""
	}
	if err := v4.NewSigner().SignHTTP(t.Context(), q.credentials, r, hex.EncodeToString(sum[:]), q.service, q.region, q.at); err != nil {
		t.Fatal(err)
	}
	if q.unsignedToken {
		r.Header.Set("X-Amz-Security-Token", token)
	}
	if q.after != nil {
		q.after(r)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	between := func(tag string) string {
		_, rest, _ := strings.Cut(string(b), "<"+tag+">")
		v, _, _ := strings.Cut(rest, "</"+tag+">")
		return html.UnescapeString(v)
	}
	if res.StatusCode != http.StatusOK && !strings.Contains(string(b), "<RequestId>") {
		t.Errorf("the answer has no request id: %s", b)
	}
	return res.StatusCode, between("Code"), between("Message")
}

func TestSignature(t *testing.T) {
	const whoami = "Action=GetCallerIdentity&Version=2011-06-15"
	setHeader := func(k, v string) func(*http.Request) { return func(r *http.Request) { r.Header.Set(k, v) } }
	replace := func(old, with string) func(*http.Request) {
		return func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), old, with, 1))
		}
	}
	emptyHash := setHeader("X-Amz-Content-Sha256", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
	for _, tt := range []struct {
		name    string
		change  func(l *lab, q *signed)
		status  int
		code    string
		message string
	}{
		{"as it should be", func(*lab, *signed) {}, 200, "", ""},
		{"4 minutes ago", func(_ *lab, q *signed) { q.at = q.at.Add(-4 * time.Minute) }, 200, "", ""},
		{"a further signed header", func(_ *lab, q *signed) { q.header = http.Header{"X-Custom": {"a  b", "c"}} }, 200, "", ""},

		{"wrong secret", func(_ *lab, q *signed) { q.credentials.SecretAccessKey += "x" }, 403, "SignatureDoesNotMatch", "does not match the signature you provided"},
		{"unknown key", func(_ *lab, q *signed) { q.credentials.AccessKeyID = "ASIAUNKNOWN" }, 403, "InvalidClientTokenId", ""},
		{"no session token", func(_ *lab, q *signed) { q.noToken = true }, 403, "InvalidClientTokenId", ""},
		{"session token not signed", func(_ *lab, q *signed) { q.unsignedToken = true }, 403, "IncompleteSignature", "x-amz-security-token"},
		{"another's session token", func(l *lab, q *signed) {
			c, _ := l.NodeCredentials()
			q.credentials.SessionToken = c.SessionToken
		}, 403, "InvalidClientTokenId", ""},
		{"another's secret", func(l *lab, q *signed) {
			c, _ := l.NodeCredentials()
			q.credentials.SecretAccessKey = c.SecretAccessKey
		}, 403, "SignatureDoesNotMatch", ""},
		{"6 minutes ago", func(_ *lab, q *signed) { q.at = q.at.Add(-6 * time.Minute) }, 403, "SignatureDoesNotMatch", "Signature expired: "},
		{"in 6 minutes", func(_ *lab, q *signed) { q.at = q.at.Add(6 * time.Minute) }, 403, "SignatureDoesNotMatch", "Signature not yet current: "},
		{"wrong region", func(_ *lab, q *signed) { q.region = "eu-west-1" }, 403, "SignatureDoesNotMatch", "valid region"},
		{"wrong service", func(_ *lab, q *signed) { q.service = "iam" }, 403, "SignatureDoesNotMatch", "correct service: 'sts'"},
		{"date of the scope differs", func(_ *lab, q *signed) {
			day := q.at.UTC().Format("20060102")
			q.after = replace("/"+day+"/", "/20200101/")
		}, 403, "SignatureDoesNotMatch", "Date in Credential scope"},
		{"other body", func(_ *lab, q *signed) {
			q.after = func(r *http.Request) {
				r.Body = io.NopCloser(strings.NewReader("Version=2011-06-15&Action=GetCallerIdentity"))
			}
		}, 403, "SignatureDoesNotMatch", ""},
		{"other query", func(_ *lab, q *signed) { q.after = func(r *http.Request) { r.URL.RawQuery = "X-Amz-Y=1" } }, 403, "SignatureDoesNotMatch", ""},
		{"other host", func(_ *lab, q *signed) { q.after = func(r *http.Request) { r.Host = "localhost" } }, 403, "SignatureDoesNotMatch", ""},
		{"other signed header", func(_ *lab, q *signed) {
			q.header = http.Header{"X-Custom": {"a"}}
			q.after = setHeader("X-Custom", "b")
		}, 403, "SignatureDoesNotMatch", ""},
		{"other date header", func(_ *lab, q *signed) {
			q.after = setHeader("X-Amz-Date", q.at.UTC().Add(time.Second).Format(timeFormat))
		}, 403, "SignatureDoesNotMatch", ""},
		{"no date header", func(_ *lab, q *signed) { q.after = func(r *http.Request) { r.Header.Del("X-Amz-Date") } }, 403, "IncompleteSignature", "X-Amz-Date"},
		{"host not signed", func(_ *lab, q *signed) { q.after = replace("host;", "") }, 403, "IncompleteSignature", "lack host"},
		{"other algorithm", func(_ *lab, q *signed) { q.after = replace("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256") }, 403, "IncompleteSignature", "AWS4-HMAC-SHA256"},
		{"no scope", func(_ *lab, q *signed) { q.after = replace("/aws4_request", "") }, 403, "IncompleteSignature", "Credential"},
		{"no signature", func(_ *lab, q *signed) { q.after = replace("Signature=", "Nothing=") }, 403, "IncompleteSignature", "Signature"},
		{"nothing", func(_ *lab, q *signed) { q.after = func(r *http.Request) { r.Header.Del("Authorization") } }, 403, "MissingAuthenticationToken", ""},
		{"session over", func(l *lab, q *signed) {
			l.shift.Store(int64(6*time.Hour + time.Second))
			q.at = q.at.Add(6*time.Hour + time.Second)
		}, 403, "ExpiredToken", "expired"},

		{"S3: as it should be, but not allowed", func(_ *lab, q *signed) {
			q.method, q.body, q.service = http.MethodGet, "", "s3"
			r := new(http.Request)
			r.Header = make(http.Header)
			emptyHash(r)
			q.header = r.Header
		}, 403, "AccessDenied", "no identity-based policy"},
		{"S3: no hash", func(_ *lab, q *signed) { q.method, q.body, q.service = http.MethodGet, "", "s3" }, 400, "AuthorizationHeaderMalformed", "x-amz-content-sha256"},
		{"S3: unknown key", func(_ *lab, q *signed) {
			q.method, q.body, q.service, q.credentials.AccessKeyID = http.MethodGet, "", "s3", "ASIAUNKNOWN"
		}, 403, "InvalidAccessKeyId", ""},
		{"S3: no session token", func(_ *lab, q *signed) { q.method, q.body, q.service, q.noToken = http.MethodGet, "", "s3", true }, 400, "InvalidToken", ""},
		{"S3: wrong region", func(_ *lab, q *signed) { q.method, q.body, q.service, q.region = http.MethodGet, "", "s3", "us-west-2" }, 400, "AuthorizationHeaderMalformed", "expecting 'eu-central-1'"},
		{"S3: 16 minutes ago", func(_ *lab, q *signed) {
			q.method, q.body, q.service, q.at = http.MethodGet, "", "s3", q.at.Add(-16*time.Minute)
		}, 403, "RequestTimeTooSkewed", ""},
		{"S3: nothing", func(_ *lab, q *signed) {
			q.method, q.body, q.after = http.MethodGet, "", func(r *http.Request) { r.Header.Del("Authorization") }
		}, 403, "AccessDenied", ""},
		{"S3: another path", func(_ *lab, q *signed) {
			q.method, q.body, q.after = http.MethodGet, "", func(r *http.Request) { r.URL.Path = "/bucket/key" }
		}, 501, "NotImplemented", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := start(t)
			q := signed{method: http.MethodPost, body: whoami, service: "sts", region: region, at: time.Now(), credentials: l.node(t)}
			tt.change(l, &q)
			status, code, message := l.send(t, q)
			if status != tt.status || code != tt.code || !strings.Contains(message, tt.message) {
				t.Errorf("%d %s %q, want %d %s %q", status, code, message, tt.status, tt.code, tt.message)
			}
			calls := l.Calls()
			if want := tt.code; len(calls) != 1 || want != "" && calls[0].Outcome != want || want == "" && calls[0].Outcome != OK {
				t.Errorf("log %+v", calls)
			}
			if status != http.StatusOK && code != "AccessDenied" && calls[0].AccessKeyID != "" {
				t.Errorf("the log names %s, whose signature was refused", calls[0].AccessKeyID)
			}
		})
	}
}

func TestUnknownParameters(t *testing.T) {
	l := start(t)
	c := l.node(t)
	for body, want := range map[string]string{
		"Action=AssumeRole&Version=2011-06-15&RoleArn=" + cart + "&RoleSessionName=me&Policy=%7B%7D":                   "ValidationError",
		"Action=AssumeRole&Version=2011-06-15&RoleArn=" + cart + "&RoleSessionName=me&RoleSessionName=you":             "ValidationError",
		"Action=AssumeRole&Version=2011-06-15&RoleArn=" + cart + "&RoleSessionName=me&Tags.member.2.Key=a":             "ValidationError",
		"Action=AssumeRole&Version=2011-06-15&RoleArn=" + cart + "&RoleSessionName=me&TransitiveTagKeys.member.1=a":    "ValidationError",
		"Action=GetCallerIdentity&Version=2011-06-15&X=1":                                                              "ValidationError",
		"Action=GetSessionToken&Version=2011-06-15":                                                                    "InvalidAction",
		"Action=GetCallerIdentity&Version=2010-01-01":                                                                  "InvalidAction",
		"Action=AssumeRole&Version=2011-06-15&RoleArn=" + cart + "&RoleSessionName=me&DurationSeconds=1h":              "MalformedInput",
		"Action=AssumeRole&Version=2011-06-15&RoleArn=" + cart + "&RoleSessionName=" + url.QueryEscape("a\nb"):         "ValidationError",
		"Action=AssumeRole&Version=2011-06-15&RoleSessionName=me":                                                      "ValidationError",
		"Action=ListUsers&Version=2010-05-08":                                                                          "InvalidAction",
		"Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleArn=" + cart + "&RoleSessionName=me&ExternalId=id-1":  "ValidationError",
		"Action=AssumeRole&Version=2011-06-15&RoleArn=" + cart + "&RoleSessionName=me&Tags.member.1.Key=a&Tags.more=1": "ValidationError",
	} {
		service := "sts"
		if strings.Contains(body, iamVersion) {
			service = "iam"
		}
		_, code, message := l.send(t, signed{method: http.MethodPost, body: body, service: service, region: region, at: time.Now(), credentials: c})
		if code != want {
			t.Errorf("%s: %s %q, want %s", body, code, message, want)
		}
	}
	status, code, _ := l.send(t, signed{method: http.MethodPost, body: strings.Repeat("a", maxBody+1), service: "sts", region: region, at: time.Now(), credentials: c})
	if status != http.StatusRequestEntityTooLarge {
		t.Errorf("a large body: %d %s", status, code)
	}
}

func TestSessionExpires(t *testing.T) {
	l := start(t)
	n := l.node(t)
	c := l.mustAssume(t, n, cart)
	l.shift.Store(int64(time.Hour - 3*time.Second))
	if _, err := l.send1(t, c, time.Hour-3*time.Second); err != nil {
		t.Errorf("3 s before its end: %v", err)
	}
	l.shift.Store(int64(time.Hour))
	if _, err := l.send1(t, c, time.Hour); err == nil {
		t.Error("accepted after its end")
	}

	l.shift.Store(0)
	l.SetSessionLength(90 * time.Second)
	c, err := l.assume(t.Context(), n, &sts.AssumeRoleInput{RoleArn: awssdk.String(cart)})
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(c.Expires); left > 90*time.Second || left < 85*time.Second {
		t.Errorf("expires in %v, want 90s", left)
	}
	owner, ok := l.Owner(c.AccessKeyID)
	if !ok || !owner.Expires.Equal(c.Expires) {
		t.Errorf("owner %+v, want the same expiry", owner)
	}
	_, err = l.assume(t.Context(), n, &sts.AssumeRoleInput{RoleArn: awssdk.String(role("long")), DurationSeconds: awssdk.Int32(7200)})
	expect(t, err, "400 ValidationError", "role chaining") // the rules hold nevertheless
}

// send1 asks who it is with a clock that is ahead.
func (l *lab) send1(t *testing.T, c awssdk.Credentials, ahead time.Duration) (string, error) {
	t.Helper()
	status, code, message := l.send(t, signed{
		method: http.MethodPost, body: "Action=GetCallerIdentity&Version=2011-06-15", service: "sts", region: region,
		at: time.Now().Add(ahead), credentials: c,
	})
	if status != http.StatusOK {
		return "", fmt.Errorf("%d %s %s", status, code, message)
	}
	return "", nil
}

func TestCalls(t *testing.T) {
	l := start(t)
	n := l.node(t)
	in := &sts.AssumeRoleInput{
		RoleArn: awssdk.String(role("tagged")), RoleSessionName: awssdk.String("shop.cart@node"), ExternalId: awssdk.String("id-1"),
		DurationSeconds: awssdk.Int32(1800), Tags: []types.Tag{{Key: awssdk.String("kubernetes-namespace"), Value: awssdk.String("shop")}},
	}
	c, err := l.assume(t.Context(), n, in)
	if err != nil {
		t.Fatal(err)
	}
	in.Tags = nil
	if _, err := l.assume(t.Context(), n, in); err == nil {
		t.Fatal("no error")
	}
	calls, err := l.WaitCalls(soon(t), 2, func(c Call) bool { return c.Operation == "AssumeRole" })
	if err != nil {
		t.Fatal(err)
	}
	got := calls[0]
	if got.RoleARN != role("tagged") || got.SessionName != "shop.cart@node" || got.ExternalID != "id-1" || got.Duration != 30*time.Minute ||
		got.Tags["kubernetes-namespace"] != "shop" || got.AccessKeyID != n.AccessKeyID || got.Issued != c.AccessKeyID || got.Outcome != OK ||
		got.Caller != "arn:aws:sts::111122223333:assumed-role/node/i-0123456789abcdef0" || !strings.HasPrefix(got.Source, "127.0.0.1:") ||
		got.RequestID == "" || time.Since(got.Time) > time.Minute {
		t.Errorf("first call %+v", got)
	}
	if got := calls[1]; got.Outcome != "AccessDenied" || got.Issued != "" || got.RequestID == calls[0].RequestID {
		t.Errorf("second call %+v", got)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if found, err := l.WaitCalls(ctx, 3, func(Call) bool { return true }); !errors.Is(err, context.Canceled) || len(found) != 2 {
		t.Errorf("%d calls and %v, want 2 and the context's error", len(found), err)
	}
	waited := make(chan error)
	go func() {
		_, err := l.WaitCalls(soon(t), 1, func(c Call) bool { return c.Operation == "GetCallerIdentity" })
		waited <- err
	}()
	if _, err := l.whoami(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
}

func TestOwner(t *testing.T) {
	l := start(t)
	n := l.node(t)
	c := l.mustAssume(t, n, cart)
	if o, ok := l.Owner(c.AccessKeyID); !ok || o.RoleARN != cart || o.SessionName != "me" || o.Node || o.ARN != "arn:aws:sts::111122223333:assumed-role/cart/me" {
		t.Errorf("owner %+v, %v", o, ok)
	}
	if o, ok := l.Owner(n.AccessKeyID); !ok || o.RoleARN != node || !o.Node {
		t.Errorf("owner %+v, %v", o, ok)
	}
	if o, ok := l.Owner("ASIAUNKNOWN"); ok {
		t.Errorf("owner %+v of an unknown key", o)
	}
	if other := l.node(t); other.AccessKeyID == n.AccessKeyID || other.SessionToken == n.SessionToken {
		t.Error("two sessions are the same")
	}
}

// soon is a context that ends before the test binary's patience does.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestFaults(t *testing.T) {
	l := start(t)
	n := l.node(t)
	ask := func(ctx context.Context, roleARN string) error {
		_, err := l.assume(ctx, n, &sts.AssumeRoleInput{RoleArn: &roleARN})
		return err
	}
	throttled := Throttled()
	throttled.Operation, throttled.RoleARN = "AssumeRole", cart
	remove := l.Inject(throttled)
	expect(t, ask(t.Context(), cart), "400 Throttling", "Rate exceeded")
	expect(t, ask(t.Context(), role("hop")), OK, "")
	if _, err := l.whoami(t.Context(), n); err != nil {
		t.Errorf("another operation: %v", err)
	}
	remove()
	remove()
	expect(t, ask(t.Context(), cart), OK, "")

	down := Unavailable()
	down.Times = 2
	l.Inject(down)
	expect(t, ask(t.Context(), cart), "503 ServiceUnavailable", "")
	expect(t, ask(t.Context(), cart), "503 ServiceUnavailable", "")
	expect(t, ask(t.Context(), cart), OK, "")

	remove = l.Inject(Fault{Delay: 200 * time.Millisecond})
	begin := time.Now()
	expect(t, ask(t.Context(), cart), OK, "")
	if took := time.Since(begin); took < 200*time.Millisecond {
		t.Errorf("took %v, want the delay", took)
	}
	remove()

	l.Inject(Fault{Hangup: true, Times: 1})
	if err := ask(t.Context(), cart); err == nil || !strings.Contains(err.Error(), "EOF") {
		t.Errorf("hangup: %v", err)
	}

	remove = l.Inject(Fault{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := ask(ctx, cart); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}
	if _, err := l.WaitCalls(soon(t), 2, func(c Call) bool { return c.Outcome == "hangup" }); err != nil {
		t.Error(err)
	}
	remove()
	expect(t, ask(t.Context(), cart), OK, "")
}

// Calls that hang or are delayed go on when the fault is removed.
func TestRemovedFaultReleasesCalls(t *testing.T) {
	for name, f := range map[string]Fault{"hang": {Hang: true}, "delay": {Delay: time.Hour}} {
		synctest.Test(t, func(t *testing.T) {
			s, err := New(Options{})
			if err != nil {
				t.Fatal(err)
			}
			remove := s.Inject(f)
			done := make(chan any, 1)
			go func() {
				w := httptest.NewRecorder()
				defer func() {
					if aborted := recover(); aborted != nil {
						done <- aborted
						return
					}
					done <- w.Code
				}()
				s.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/?Action=GetCallerIdentity&Version=2011-06-15", nil))
			}()
			synctest.Wait()
			select {
			case answer := <-done:
				t.Fatalf("%s: answered %v", name, answer)
			default:
			}
			begin := time.Now()
			remove()
			answer := <-done
			if want := any(http.StatusForbidden); name == "delay" && answer != want {
				t.Errorf("delay: %v, want the answer to an unsigned call", answer)
			}
			if name == "hang" && answer != any(http.ErrAbortHandler) {
				t.Errorf("hang: %v, want no answer", answer)
			}
			if waited := time.Since(begin); waited != 0 {
				t.Errorf("%s: released after %v", name, waited)
			}
		})
	}
}

func TestConcurrentUse(t *testing.T) {
	l := start(t)
	n := l.node(t)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for range 5 {
				remove := l.Inject(Fault{Operation: "ListGroups", Delay: time.Millisecond})
				c, err := l.assume(t.Context(), n, &sts.AssumeRoleInput{RoleArn: awssdk.String(cart), RoleSessionName: awssdk.String(fmt.Sprintf("me-%d", i))})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := iam.NewFromConfig(l.config(c)).ListGroups(t.Context(), nil); err != nil {
					t.Error(err)
				}
				l.SetSessionLength(time.Duration(i) * time.Hour)
				l.Owner(c.AccessKeyID)
				l.Calls()
				remove()
			}
		})
	}
	all.Wait()
	if n := len(l.Calls()); n != 80 {
		t.Errorf("%d calls logged, want 80", n)
	}
}

// Unmodified endpoints over HTTPS: the SDK resolves them itself, only the dialer leads to loopback.
func TestEndpointsOverTLS(t *testing.T) {
	cert, authority, err := Certificate(append(Hosts(region), "127.0.0.1")...)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authority) {
		t.Fatal("the authority is no certificate")
	}
	l := start(t)
	addr := "127.0.0.1:0"
	e := &Endpoint{
		Handler: l.Server, TLS: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
		Listen: func() (net.Listener, error) {
			listener, err := net.Listen("tcp", addr)
			if err == nil {
				addr = listener.Addr().String()
			}
			return listener, err
		},
	}
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Kill() })
	if err := e.Start(); err == nil {
		t.Error("started twice")
	}
	var hosts []string
	config := func(c awssdk.Credentials) awssdk.Config {
		cfg := l.config(c)
		cfg.BaseEndpoint = nil
		cfg.HTTPClient = &http.Client{Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
			DialContext: func(ctx context.Context, network, host string) (net.Conn, error) {
				hosts = append(hosts, host)
				return new(net.Dialer).DialContext(ctx, network, addr)
			},
		}}
		return cfg
	}
	n := l.node(t)
	out, err := sts.NewFromConfig(config(n)).AssumeRole(t.Context(), &sts.AssumeRoleInput{RoleArn: awssdk.String(cart), RoleSessionName: awssdk.String("me")})
	if err != nil {
		t.Fatal(err)
	}
	c := awssdk.Credentials{AccessKeyID: *out.Credentials.AccessKeyId, SecretAccessKey: *out.Credentials.SecretAccessKey, SessionToken: *out.Credentials.SessionToken}
	if _, err := s3.NewFromConfig(config(c)).ListBuckets(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if _, err := iam.NewFromConfig(config(c)).ListGroups(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if got, want := strings.Join(hosts, " "), "sts.eu-central-1.amazonaws.com:443 s3.eu-central-1.amazonaws.com:443 iam.amazonaws.com:443"; got != want {
		t.Errorf("dialled %q, want %q", got, want)
	}
	// Where the host names a region or a service, only those will do.
	wrong := config(c)
	wrong.Region = "eu-west-1"
	_, err = s3.NewFromConfig(wrong, func(o *s3.Options) { o.BaseEndpoint = awssdk.String("https://s3.eu-central-1.amazonaws.com") }).ListBuckets(t.Context(), nil)
	expect(t, err, "400 AuthorizationHeaderMalformed", "")
	_, err = sts.NewFromConfig(config(c), func(o *sts.Options) { o.BaseEndpoint = awssdk.String("https://iam.amazonaws.com") }).GetCallerIdentity(t.Context(), nil)
	expect(t, err, "400 InvalidAction", "")

	if err := e.Kill(); err != nil {
		t.Error(err)
	}
	if _, err := sts.NewFromConfig(config(n)).GetCallerIdentity(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("after its death: %v", err)
	}
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := sts.NewFromConfig(config(n)).GetCallerIdentity(t.Context(), nil); err != nil {
		t.Errorf("after its return: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Kill(); err != nil {
		t.Error(err)
	}
	if err := e.Run(ctx); err != nil {
		t.Error(err)
	}
	if err := e.Kill(); err != nil {
		t.Error(err)
	}
}

// An AWS CLI that knows nothing of this server reads its answers.
func TestAWSCLI(t *testing.T) {
	const cli = "/usr/bin/aws"
	if _, err := os.Stat(cli); err != nil {
		t.Fatalf("%v: apt-get install awscli", err)
	}
	l := start(t)
	c := l.mustAssume(t, l.node(t), cart)
	run := func(c awssdk.Credentials, args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), cli, append(args, "--endpoint-url", l.url)...)
		cmd.Env = []string{
			"PATH=/usr/bin:/bin", "HOME=" + t.TempDir(), "AWS_CONFIG_FILE=" + os.DevNull, "AWS_SHARED_CREDENTIALS_FILE=" + os.DevNull,
			"AWS_EC2_METADATA_DISABLED=true", "AWS_PAGER=", "AWS_REGION=" + region, "AWS_MAX_ATTEMPTS=1",
			"AWS_ACCESS_KEY_ID=" + c.AccessKeyID, "AWS_SECRET_ACCESS_KEY=" + c.SecretAccessKey, "AWS_SESSION_TOKEN=" + c.SessionToken,
		}
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
		}
		return stdout.String(), nil
	}
	out, err := run(c, "s3", "ls")
	if err != nil || !strings.Contains(out, " carts\n") || !strings.Contains(out, " orders\n") {
		t.Errorf("s3 ls: %q, %v", out, err)
	}
	out, err = run(c, "iam", "list-groups")
	var groups struct {
		Groups []struct{ GroupName, Arn string }
	}
	if err != nil || json.Unmarshal([]byte(out), &groups) != nil || len(groups.Groups) != 1 || groups.Groups[0].Arn != "arn:aws:iam::111122223333:group/admins" {
		t.Errorf("iam list-groups: %q, %v", out, err)
	}
	out, err = run(c, "sts", "get-caller-identity")
	var id struct{ Account, Arn, UserId string }
	if err != nil || json.Unmarshal([]byte(out), &id) != nil || id.Arn != "arn:aws:sts::111122223333:assumed-role/cart/me" || id.Account != account || !strings.HasSuffix(id.UserId, ":me") {
		t.Errorf("sts get-caller-identity: %q, %v", out, err)
	}
	out, err = run(l.node(t), "sts", "assume-role", "--role-arn", role("external"), "--role-session-name", "cli", "--external-id", "id-1")
	var assumed struct {
		Credentials     struct{ AccessKeyId, Expiration string }
		AssumedRoleUser struct{ AssumedRoleId string }
	}
	if err != nil || json.Unmarshal([]byte(out), &assumed) != nil || assumed.Credentials.AccessKeyId == "" || !strings.HasSuffix(assumed.AssumedRoleUser.AssumedRoleId, ":cli") {
		t.Errorf("sts assume-role: %q, %v", out, err)
	}
	for _, tt := range []struct {
		want string
		args []string
	}{
		{"An error occurred (AccessDenied) when calling the ListBuckets operation", []string{"s3", "ls"}},
		{"An error occurred (AccessDenied) when calling the ListGroups operation", []string{"iam", "list-groups"}},
		{"An error occurred (AccessDenied) when calling the AssumeRole operation", []string{"sts", "assume-role", "--role-arn", role("external"), "--role-session-name", "cli"}},
	} {
		if out, err := run(l.node(t), tt.args...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %q, %v, want %q", tt.args, out, err, tt.want)
		}
	}
	stolen := c
	stolen.SecretAccessKey = "x"
	if out, err := run(stolen, "sts", "get-caller-identity"); err == nil || !strings.Contains(err.Error(), "(SignatureDoesNotMatch)") {
		t.Errorf("wrong secret: %q, %v", out, err)
	}
}

func TestNewRefusesNonsense(t *testing.T) {
	for name, o := range map[string]Options{
		"no ARN":            {Roles: []Role{{ARN: "node"}}},
		"no account":        {Roles: []Role{{ARN: "arn:aws:iam::12:role/x"}}},
		"a user":            {Roles: []Role{{ARN: user}}},
		"duration":          {Roles: []Role{{ARN: node, MaxSessionDuration: time.Minute}}},
		"no principal":      {Roles: []Role{{ARN: node, Trust: []Trust{{}}}}},
		"two principals":    {Roles: []Role{{ARN: node, Trust: []Trust{{AWS: node, Federated: "x"}}}}},
		"condition":         {Roles: []Role{{ARN: node, Trust: []Trust{{AWS: node, Subject: "x"}}}}},
		"unknown node role": {NodeRoleARN: node},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	s, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.NodeCredentials(); err == nil {
		t.Error("credentials of no node role")
	}
	if _, err := s.UserCredentials(node); err == nil {
		t.Error("a role is no user")
	}
}
