package aws

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"math/big"
	"strings"
	"testing"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

const issuer = "https://oidc.example.test/id/1"

// issuerKeys are an API server's keys.
type issuerKeys struct {
	rsa   *rsa.PrivateKey
	ecdsa *ecdsa.PrivateKey
}

func newKeys(t *testing.T) issuerKeys {
	t.Helper()
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	e, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return issuerKeys{r, e}
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func (k issuerKeys) jwks(t *testing.T) []byte {
	t.Helper()
	point, err := k.ecdsa.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"keys": []map[string]string{
		{"kid": "r", "kty": "RSA", "use": "sig", "alg": "RS256", "n": b64(k.rsa.N.Bytes()), "e": b64(big.NewInt(int64(k.rsa.E)).Bytes())},
		{"kid": "e", "kty": "EC", "use": "sig", "alg": "ES256", "crv": "P-256", "x": b64(point[1:33]), "y": b64(point[33:])},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// token signs claims; the key id tells with which key.
func (k issuerKeys) token(t *testing.T, header, claims map[string]any) string {
	t.Helper()
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b64(b)
	}
	signed := part(header) + "." + part(claims)
	sum := sha256.Sum256([]byte(signed))
	if header["kid"] == "e" {
		r, s, err := ecdsa.Sign(rand.Reader, k.ecdsa, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		sig := make([]byte, 64)
		r.FillBytes(sig[:32])
		s.FillBytes(sig[32:])
		return signed + "." + b64(sig)
	}
	sig, err := rsa.SignPKCS1v15(rand.Reader, k.rsa, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + b64(sig)
}

func TestWebIdentity(t *testing.T) {
	keys, otherKeys := newKeys(t), newKeys(t)
	l := start(t)
	var jwksErr error
	l.SetProvider(Provider{Account: account, Issuer: issuer, ClientIDs: []string{"sts.amazonaws.com", "other"}, Keys: func(context.Context) ([]byte, error) {
		return keys.jwks(t), jwksErr
	}})
	l.SetProvider(Provider{Account: "444455556666", Issuer: "https://elsewhere.example.test", Keys: func(context.Context) ([]byte, error) {
		return keys.jwks(t), nil
	}})
	c := l.config(awssdk.Credentials{})
	c.Credentials = nil
	client := sts.NewFromConfig(c)

	rs := map[string]any{"alg": "RS256", "kid": "r"}
	good := map[string]any{
		"iss": issuer, "sub": "system:serviceaccount:shop:cart", "aud": []string{"sts.amazonaws.com"},
		"exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(), "nbf": time.Now().Unix(),
	}
	with := func(m map[string]any, k string, v any) map[string]any {
		m = maps.Clone(m)
		m[k] = v
		return m
	}
	valid := keys.token(t, rs, good)
	parts := strings.Split(valid, ".")
	const invalid, denied = "400 InvalidIdentityToken", "403 AccessDenied"
	for _, tt := range []struct {
		name    string
		role    string
		token   string
		seconds int32
		want    string
		message string
	}{
		{name: "RS256", token: valid, want: OK},
		{name: "ES256", token: keys.token(t, map[string]any{"alg": "ES256", "kid": "e"}, good), want: OK},
		{name: "audience as a string", token: keys.token(t, rs, with(good, "aud", "sts.amazonaws.com")), want: OK},
		{name: "two hours: not chaining", token: valid, seconds: 7200, want: OK},
		{name: "beyond the maximum of the role", token: valid, seconds: 7201, want: "400 ValidationError", message: "MaxSessionDuration"},
		{name: "too short", token: valid, seconds: 60, want: "400 ValidationError", message: "900"},

		{name: "another service account", token: keys.token(t, rs, with(good, "sub", "system:serviceaccount:shop:admin")), want: denied,
			message: "Not authorized to perform sts:AssumeRoleWithWebIdentity"},
		{name: "audience the provider knows and the role does not", token: keys.token(t, rs, with(good, "aud", "other")), want: denied},
		{name: "audience the provider does not know", token: keys.token(t, rs, with(good, "aud", "vault")), want: invalid, message: "Incorrect token audience"},
		{name: "another issuer", token: keys.token(t, rs, with(good, "iss", "https://evil.example.test")), want: invalid,
			message: "No OpenIDConnect provider found in your account for https://evil.example.test"},
		{name: "a provider of another account", token: keys.token(t, rs, with(good, "iss", "https://elsewhere.example.test")), want: invalid, message: "No OpenIDConnect provider"},
		{name: "role of another account", role: "arn:aws:iam::444455556666:role/foreign", token: valid, want: invalid, message: "No OpenIDConnect provider"},
		{name: "role that trusts no token", role: cart, token: valid, want: denied},
		{name: "no such role", role: role("unknown"), token: valid, want: denied},

		{name: "expired", token: keys.token(t, rs, with(good, "exp", time.Now().Add(-time.Second).Unix())), want: "400 ExpiredTokenException", message: "Token expired: current date/time"},
		{name: "not yet valid", token: keys.token(t, rs, with(good, "nbf", time.Now().Add(time.Hour).Unix())), want: invalid},
		{name: "no expiry", token: keys.token(t, rs, with(good, "exp", 0)), want: invalid, message: "not a valid JWT"},
		{name: "no subject", token: keys.token(t, rs, with(good, "sub", "")), want: invalid, message: "not a valid JWT"},
		{name: "no audience", token: keys.token(t, rs, with(good, "aud", []string{})), want: invalid, message: "not a valid JWT"},
		{name: "another's key", token: otherKeys.token(t, rs, good), want: invalid, message: "signature"},
		{name: "another's key, ES256", token: otherKeys.token(t, map[string]any{"alg": "ES256", "kid": "e"}, good), want: invalid, message: "signature"},
		{name: "unknown key", token: keys.token(t, with(rs, "kid", "z"), good), want: invalid, message: "verification key"},
		{name: "algorithm none", token: keys.token(t, with(rs, "alg", "none"), good), want: invalid, message: "verification key"},
		{name: "algorithm of another key", token: keys.token(t, with(rs, "alg", "ES256"), good), want: invalid, message: "verification key"},
		{name: "symmetric algorithm", token: keys.token(t, with(rs, "alg", "HS256"), good), want: invalid, message: "verification key"},
		{name: "no signature", token: parts[0] + "." + parts[1] + ".", want: invalid, message: "signature"},
		{name: "changed claims", token: parts[0] + "." + strings.Split(keys.token(t, rs, with(good, "x", 1)), ".")[1] + "." + parts[2], want: invalid, message: "signature"},
		{name: "no JWT", token: "abcd", want: invalid, message: "not a valid JWT"},
		{name: "too short for one", token: "abc", want: "400 ValidationError", message: "webIdentityToken"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := &sts.AssumeRoleWithWebIdentityInput{RoleArn: awssdk.String(role("web")), RoleSessionName: awssdk.String("shop.cart"), WebIdentityToken: &tt.token}
			if tt.role != "" {
				in.RoleArn = &tt.role
			}
			if tt.seconds != 0 {
				in.DurationSeconds = &tt.seconds
			}
			out, err := client.AssumeRoleWithWebIdentity(t.Context(), in)
			expect(t, err, tt.want, tt.message)
			calls := l.Calls()
			last := calls[len(calls)-1]
			if last.Operation != "AssumeRoleWithWebIdentity" || last.RoleARN != *in.RoleArn || (last.Outcome == OK) != (err == nil) || last.AccessKeyID != "" {
				t.Errorf("log %+v", last)
			}
			if err != nil {
				if strings.Contains(err.Error(), tt.token) {
					t.Errorf("the error repeats the token: %v", err)
				}
				return
			}
			if *out.SubjectFromWebIdentityToken != "system:serviceaccount:shop:cart" || *out.Audience != "sts.amazonaws.com" || last.Caller != *out.SubjectFromWebIdentityToken {
				t.Errorf("answer %+v, log %+v", out, last)
			}
			issued := awssdk.Credentials{AccessKeyID: *out.Credentials.AccessKeyId, SecretAccessKey: *out.Credentials.SecretAccessKey, SessionToken: *out.Credentials.SessionToken}
			if _, err := s3.NewFromConfig(l.config(issued)).ListBuckets(t.Context(), nil); err != nil {
				t.Error(err)
			}
			if o, ok := l.Owner(issued.AccessKeyID); !ok || o.RoleARN != role("web") || o.SessionName != "shop.cart" {
				t.Errorf("owner %+v", o)
			}
		})
	}

	in := &sts.AssumeRoleWithWebIdentityInput{RoleArn: awssdk.String(role("web")), RoleSessionName: awssdk.String("shop.cart"), WebIdentityToken: &valid}
	jwksErr = errors.New("the issuer is down")
	_, err := client.AssumeRoleWithWebIdentity(t.Context(), in)
	expect(t, err, invalid, "verification key")
	jwksErr = nil
	keys = otherKeys // the API server's keys are changed
	_, err = client.AssumeRoleWithWebIdentity(t.Context(), in)
	expect(t, err, invalid, "signature")
}

func TestKeysOfAnySize(t *testing.T) {
	for _, set := range []string{
		"", "null", "{}", `{"keys":[{}]}`, `{"keys":[{"kid":"r","kty":"RSA"}]}`,
		`{"keys":[{"kid":"r","kty":"RSA","n":"AQAB","e":"AQAB"}]}`,
		`{"keys":[{"kid":"r","kty":"RSA","n":"` + strings.Repeat("A", 400) + `","e":"` + strings.Repeat("z", 400) + `"}]}`,
		`{"keys":[{"kid":"r","kty":"EC","crv":"P-256","x":"` + strings.Repeat("z", 400) + `","y":"AQAB"}]}`,
		`{"keys":[{"kid":"r","kty":"EC","crv":"P-256","x":"AQAB","y":"AQAB"}]}`,
		`{"keys":[{"kid":"r","kty":"EC","crv":"P-256","x":"%","y":"%"}]}`,
	} {
		for _, alg := range []string{"RS256", "ES256"} {
			if _, err := findKey([]byte(set), "r", alg); err == nil {
				t.Errorf("%s: a key for %s", set, alg)
			}
		}
	}
}
